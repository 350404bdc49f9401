"""The text on which published models are compared, and their perplexity on it."""

from collections import Counter
from dataclasses import dataclass

from plrd_train.data.corpus import Corpus
from plrd_train.data.documents import evaluation_documents
from plrd_train.evaluate.perplexity import Perplexity, perplexity
from plrd_train.evaluate.published import Published
from plrd_train.parents.tokenization import compare
from plrd_train.tracking import console


@dataclass(frozen=True)
class HeldOut:
    """The first `context` tokens of each document of `corpus`, at most `tokens` predicted ones in all; `batch`
    documents are read at once."""

    corpus: Corpus
    context: int
    tokens: int
    batch: int
    skip_bad: bool

    def measure(self, published: Published, name: str) -> Perplexity:
        """Perplexity of a model, with progress under its `name`. Raises what `evaluation_documents` raises."""
        compare(published.tokenizer, published.folder, self.corpus)
        skipped = Counter[str]()
        context = min(self.context, published.positions or self.context)
        if context < self.context:
            console.say(
                f"note: {published.path} has position embeddings for {context} tokens: it reads so many of each "
                "document"
            )
        documents = evaluation_documents(self.corpus, published.tokenizer, context, self.tokens, self.skip_bad, skipped)
        for reason, count in skipped.items():
            console.say(f"{self.corpus.spec}: passed over {count} of: {reason}")
        with console.progress(
            f"perplexity of {name}", sum(len(document.ids) - 1 for document in documents), "tokens"
        ) as bar:
            return perplexity(published, documents, self.batch, bar.update)
