"""The text on which published models are compared."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from plrd_train.data.corpus import Corpus
from plrd_train.data.documents import evaluation_documents
from plrd_train.evaluate import Subject
from plrd_train.evaluate.perplexity import Evaluator
from plrd_train.parents.published import Published
from plrd_train.parents.tokenization import compare
from plrd_train.tracking import console


@dataclass(frozen=True)
class HeldOut:
    """The documents of `corpus`, read as `perplexity` says; `skip_bad` passes over bad lines."""

    corpus: Corpus
    perplexity: Evaluator
    skip_bad: bool

    @contextmanager
    def subject(
        self, published: Published, name: str, parent: Callable[[], Published] | None = None
    ) -> Iterator[Subject]:
        """A published model to evaluate on this text, with progress under its `name`. Raises what
        `evaluation_documents` raises."""
        compare(published.tokenizer, published.folder, self.corpus)
        skipped, asked = Counter[str](), self.perplexity.context
        context = min(asked, published.positions or asked)
        if context < asked:
            console.say(
                f"note: {published.path} has position embeddings for {context} tokens: it reads so many of each "
                "document"
            )
        documents = evaluation_documents(
            self.corpus, published.tokenizer, context, self.perplexity.tokens, self.skip_bad, skipped
        )
        for reason, count in skipped.items():
            console.say(f"{self.corpus.spec}: passed over {count} of: {reason}")
        tokens = sum(len(document.ids) - 1 for document in documents)
        with console.progress(f"perplexity of {name}", tokens, "tokens") as bar:
            yield Subject(published, published.tokenizer, documents, parent, bar.update)
