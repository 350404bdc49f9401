"""The image, built without a container engine: by buildah on a plain Debian from debootstrap, and the quickstart run
inside."""

import ast
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from debian import require_debian

ROOT = Path(__file__).resolve().parents[2]
STRANGER = "4321:4321"  # a user of whom the image knows nothing
NEEDED_GB = 12
Buildah = Callable[..., str]


@pytest.fixture(scope="module")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buildah]:
    """buildah(*arguments) -> what it wrote to standard output. All that it stores lies in a temporary folder; nothing
    outlives the tests."""
    if os.geteuid():
        pytest.skip("needs root: images are built by chroot")
    require_debian("buildah", "debootstrap")
    folder = tmp_path_factory.mktemp("buildah")
    if shutil.disk_usage(folder).free < NEEDED_GB * 1e9:
        pytest.skip(f"needs {NEEDED_GB} GB of disk in {folder} (--basetemp gives another place)")
    (folder / "tmp").mkdir()
    environment = {**os.environ, "BUILDAH_ISOLATION": "chroot", "TMPDIR": str(folder / "tmp")}
    cache = Path("/var/lib/containers")  # buildah has no option to keep its notes on layers elsewhere
    had_cache = cache.exists()

    def run(*arguments: str | Path) -> str:
        command = ["buildah", "--root", folder / "root", "--runroot", folder / "runroot", *arguments]
        done = subprocess.run(
            command, env=environment, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        assert done.returncode == 0, (
            f"buildah {' '.join(map(str, arguments))}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        )
        return done.stdout

    try:
        yield run
    finally:
        run("rm", "--all")
        assert str(folder) not in Path("/proc/self/mountinfo").read_text()
        shutil.rmtree(folder)
        if not had_cache:
            shutil.rmtree(cache, ignore_errors=True)


@pytest.fixture(scope="module")
def context(buildah: Buildah, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a builder gets of a checkout in which a user has worked, and left secrets."""
    checkout, context = tmp_path_factory.mktemp("checkout") / "plrd", tmp_path_factory.mktemp("context") / "plrd"
    shutil.copytree(
        ROOT,
        checkout,
        ignore=shutil.ignore_patterns(
            ".git", ".venv", ".*_cache", ".hypothesis", "runs", "wandb", "outputs", "multirun"
        ),
    )
    for name in (
        ".env",
        ".netrc",
        ".git/config",
        ".venv/bin/python",
        "hosts",
        "runs/mine/family.json",
        "conf/.env",
        "launch/.netrc",
        "wandb/log",
    ):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("planted")
    file = tmp_path_factory.mktemp("file") / "Dockerfile"
    file.write_text("FROM scratch\nCOPY . /\n")
    buildah("bud", "--file", file, "--output", f"type=local,dest={context}", checkout)
    return context


@pytest.fixture(scope="module")
def image(buildah: Buildah, context: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The name of the image, built on a plain Debian."""
    folder = tmp_path_factory.mktemp("base")
    made = subprocess.run(
        ["debootstrap", "--variant=minbase", "bookworm", folder / "root"], capture_output=True, text=True
    )
    if made.returncode:
        pytest.skip(f"debootstrap failed: {(made.stdout + made.stderr).strip().splitlines()[-1]}")
    (folder / "root/etc/dpkg/dpkg.cfg.d/speedup").write_text("force-unsafe-io\n")  # as in Debian's own image
    base = buildah("from", "scratch").strip()
    buildah("add", base, folder / "root", "/")
    buildah("commit", "--rm", base, "localhost/base")
    shutil.rmtree(folder / "root")
    arguments = ["--build-arg", "BASE=localhost/base", "--pull-never", *_pip_configuration(folder)]
    buildah("bud", *arguments, "--file", ROOT / "Dockerfile", "--tag", "localhost/plrd", context)
    return "localhost/plrd"


def _pip_configuration(folder: Path) -> list[str]:
    """Options that lend a build this machine's configuration of pip, with the folders and the certificate that it
    names."""
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    given: dict[str, str] = {}
    for line in sorted(listed.splitlines()):  # `:env:` sorts, and counts, before files
        key, _, value = line.partition("=")
        given.setdefault(key.rpartition(".")[2], " ".join(ast.literal_eval(value).split()))
    volumes = {folder / "pip.conf": "/etc/pip.conf"}
    for option, value in given.items():
        for word in value.split():
            path = Path(word.removeprefix("file://"))
            # A certificate: not over the file of that name that a package of the build brings.
            if path.is_absolute() and path.is_file():
                volumes[path] = given[option] = f"/run/pip/{path.name}"
            elif path.is_absolute() and path.is_dir():  # the files of an index lie beside it
                path = path.parent if word.startswith("file:") else path
                volumes[path] = str(path)
    (folder / "pip.conf").write_text("[global]\n" + "".join(f"{option} = {value}\n" for option, value in given.items()))
    return [word for outside, inside in volumes.items() for word in ("--volume", f"{outside}:{inside}:ro")]


@pytest.fixture(scope="module")
def run(buildah: Buildah, image: str) -> Callable[..., str]:
    """run(*command, options=()) -> what the command wrote in one container of the image."""
    container = buildah("from", "--pull-never", image).strip()
    return lambda *command, options=(): buildah("run", *options, container, "--", *command)


@pytest.fixture(scope="module")
def config(buildah: Buildah, image: str) -> dict:
    return json.loads(buildah("inspect", "--type", "image", image))["OCIv1"]["config"]


def test_a_builder_gets_the_sources_alone(context: Path) -> None:
    files = {path.relative_to(context): path for path in context.rglob("*") if path.is_file()}
    assert {path.parts[0] for path in files} == {
        "LICENSE",
        "README.md",
        "conf",
        "launch",
        "plrd_train",
        "pyproject.toml",
        "requirements.lock",
    }
    assert not [name for name, path in files.items() if path.read_bytes() == b"planted"]
    sources = {
        path.relative_to(ROOT)
        for folder in ("conf", "launch", "plrd_train")
        for path in (ROOT / folder).rglob("*")
        if path.is_file()
    }
    assert {path for path in sources if "__pycache__" not in path.parts} <= set(files)
    assert sum(path.stat().st_size for path in files.values()) < 2e6


def test_the_entry_point_is_plrd_and_the_user_not_root(run: Callable[..., str], config: dict) -> None:
    assert importlib.metadata.version("plrd-train") in run(*config["Entrypoint"], "--version")
    assert "FAMILY" in run(*config["Entrypoint"], "show", "--help")
    assert run("id", "--user").strip() != "0"
    # No key, no token, no host of the builder.
    assert not [variable for variable in config["Env"] if variable.split("=")[0] not in {"HOME", "PATH"}]


def test_the_lock_is_installed(run: Callable[..., str]) -> None:
    installed = {line.split("+")[0] for line in run("pip", "freeze", "--exclude", "plrd-train").splitlines()}
    assert set((ROOT / "requirements.lock").read_text().splitlines()) <= installed
    module = run("python", "-c", "import plrd_train.config.compose as c; print(c.__file__, c.CONF)")
    assert all("site-packages/plrd_train/" in path for path in module.split())  # the wheel, with conf/ inside


def test_the_quickstart_runs_inside(run: Callable[..., str], config: dict) -> None:
    quick = ["parent.scratch.tokens=10_000", "stages.tokens=5_000", "stages.ratios=[2]", "evaluation.tokens=2000"]
    run("local.sh", "experiment=quickstart", *quick, options=["--env", "OMP_NUM_THREADS=1"])
    shown = json.loads(run(*config["Entrypoint"], "show", "runs/quickstart", "--json"))
    assert [member["ratio_requested"] for member in shown["members"]] == [2]
    assert json.loads(run("cat", "runs/quickstart/family.json"))["members"][0]["world_size"] == 2
    found = run("find", "runs", "-name", "*.safetensors", "-printf", "%p %u\n").splitlines()
    assert any("members/2x/" in line for line in found)
    assert run("find", "runs", "-mindepth", "1", "-not", "-user", "plrd") == ""


def test_any_user_can_run_it(run: Callable[..., str], config: dict) -> None:
    """What it writes has a place, and what is compiled at run time finds a compiler and Python's headers."""
    as_stranger = ["--user", STRANGER]
    run("sh", "-c", 'touch "$HOME/.cache/huggingface/mine" runs/mine', options=as_stranger)
    includes = run("python", "-c", "import sysconfig; print(sysconfig.get_path('include'))").strip()
    run(
        "sh",
        "-c",
        f"printf '#include <Python.h>\n#include <vector>\n' | c++ -x c++ -I{includes} -c -o /tmp/it.o -",
        options=as_stranger,
    )
    assert "FAMILY" in run(*config["Entrypoint"], "--help", options=as_stranger)
