"""README and docs: every command on them is run, every study snippet is parsed.

On the pages a command stands in an ``sh`` block, in a ``console`` block (after ``$``, its output
below it), or in a line of text as a code span of more than one word. A ``yaml`` block names the
file that it adds to in its first line; ``text`` is for what is none of these.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from markdown_it import MarkdownIt

from persona_assets import environment
from persona_assets.study import parse_study
from persona_assets_tests.conftest import PROJECT
from persona_assets_tests.integration.project import Project

PAGES = ("README.md", *(f"docs/{path.name}" for path in sorted((PROJECT / "docs").glob("*.md"))))

#: First words by which a code span or a line of another block is known to be a command.
PROGRAMS = ("persona-assets", "make", "dagster", "python", "python3", "pip", "pytest", "export")

#: Commands that no test can run here, and what runs them: of a target of make, what its recipe
#: must hold.
ELSEWHERE = {
    "make demo": "persona-assets run --study mini",  # the fixture `project`, by the same command
    "make ui": "persona-assets ui",
    "make test": "pytest",  # it is what runs this
    "make test-vllm": "pytest persona_assets_tests/vllm",
    "make reliability": "persona_assets_tests.reliability",  # a sample of each section is a test
    "python -m persona_assets_tests.reliability --results FOLDER --only kills": "",
    "persona-assets publish": "",  # test_publish_wandb.py
    "persona-assets publish --to hub": "",  # test_hub_round_trip.py
    "persona-assets ui": "",  # webserver.py, for the tests of what is served
    # On a GPU; the server itself in evaluation/test_server.py, over vLLM in vllm/test_server.py.
    "persona-assets serve": "",
    "persona-assets serve --study length_matched": "",
    "pip install '.[s3]'": "",  # what tests need of it is installed
    "pip install '.[gpu]'": "",  # some gigabytes, for a GPU
    # Postgres and Ray: `make scale`, and a sample in scale/test_sample.py.
    "make scale": "pytest -m heavy",
    "pip install '.[postgres]'": "",
    "pip install '.[postgres,ray]'": "",
    "ray start --head --dashboard-host 127.0.0.1 --disable-usage-stats": "",
    "ray start --address HEAD:6379 --disable-usage-stats": "",
}

NUMBER = r"[-−]?\d(?:[\d.,e+−-]*\d)?"


@dataclass(frozen=True)
class Command:
    """Shell text of a page; ``shown`` is the output printed below it, if any is."""

    page: str
    line: int
    text: str
    shown: str | None = None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Snippet:
    """A YAML block, and the file that it adds to."""

    page: str
    line: int
    file: str
    content: dict

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


class UnknownBlock(ValueError):
    """A block of which nobody could say whether it holds a command."""


def read_page(page: str, text: str) -> Iterator[Command | Snippet]:
    """The commands and snippets of a page, in order.

    Raises:
        UnknownBlock: an indented block or an unknown kind of fence; a command in a `text` block.
    """
    line = 0
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        line = token.map[0] + 1 if token.map else line
        if token.type == "code_block":
            raise UnknownBlock(f"{page}:{line}: say what the block is: ```sh, ```yaml, ```text")
        if token.type == "fence":
            yield from _read_block(page, line, token.info.strip(), token.content)
        for part in token.children or ():
            words = part.content.split()
            if part.type == "code_inline" and len(words) > 1 and words[0] in PROGRAMS:
                yield Command(page, line, part.content)


def _read_block(page: str, line: int, kind: str, text: str) -> Iterator[Command | Snippet]:
    where = f"{page}:{line}"
    if kind == "sh":
        rows = [row.partition("#")[0].strip() for row in text.splitlines()]
        apart = rows if set(rows) <= ELSEWHERE.keys() else [text]
        yield from (Command(page, line, command) for command in apart)
    elif kind == "console":
        before, *commands = re.split(r"^\$ ", text, flags=re.MULTILINE)
        if before:
            raise UnknownBlock(f"{where}: a console block starts with `$ `")
        for command in commands:
            first, _, shown = command.partition("\n")
            yield Command(page, line, first, shown)
            line += command.count("\n")
    elif kind == "yaml":
        named = re.match(r"# (\S+\.yaml)\n", text)
        if not named:
            raise UnknownBlock(f"{where}: name the file in the first line: # mini.yaml")
        yield Snippet(page, line, named[1], yaml.safe_load(text))
    elif kind == "text":
        for row in text.splitlines():
            if row.removeprefix("$").split()[:1] and row.removeprefix("$").split()[0] in PROGRAMS:
                raise UnknownBlock(f"{where}: a command in a text block is not run: {row}")
    else:
        raise UnknownBlock(f"{where}: a block of kind {kind!r}: use sh, console, yaml or text")


FOUND = [item for page in PAGES for item in read_page(page, (PROJECT / page).read_text("utf-8"))]
COMMANDS = [item for item in FOUND if isinstance(item, Command)]
SNIPPETS = [item for item in FOUND if isinstance(item, Snippet)]


def as_pattern(shown: str) -> str:
    """A regular expression for output of the form ``shown``.

    ``…`` stands for anything in a line, and alone in a line for any lines; numbers and the widths
    of columns and rules are free, all else is not.
    """
    return "".join(
        r"(?:.*\n)*?" if line.strip() == "…" else f"{_line_pattern(line)}\n"
        for line in shown.splitlines()
    )


def _line_pattern(line: str) -> str:
    words = [_word_pattern(word) for word in line.split()]
    return r" *" + r" +".join(words) + r" *"


def _word_pattern(word: str) -> str:
    number = re.fullmatch(rf"(\W*?){NUMBER}(\W*)", word)
    if number:
        return re.escape(number[1]) + NUMBER + re.escape(number[2])
    if re.fullmatch("-{2,}", word):
        return "-+"
    return ".*".join(re.escape(part) for part in word.split("…"))


#: The study that is meant where a command names none is the tiny one, not `mini`.
SHIM = f"""#!/bin/bash
case " $* " in
  *" --study "* | *" --help "*) exec {sys.executable} -m persona_assets "$@" ;;
  *) exec {sys.executable} -m persona_assets "$1" --study tiny "${{@:2}}" ;;
esac
"""


@dataclass
class Checkout:
    """A folder like a checkout, with the complete tiny study, and the commands on its PATH."""

    root: Path
    done: dict[str, subprocess.CompletedProcess[str]]

    def run(self, text: str) -> subprocess.CompletedProcess[str]:
        """``text`` in a shell of its own, once for each text."""
        if text not in self.done:
            path = f"{self.root / 'bin'}{os.pathsep}{os.environ['PATH']}"
            self.done[text] = subprocess.run(
                ["bash", "-euc", text],
                env=Project(self.root / "data").environment
                | {"PATH": path, "PYTHONPATH": str(PROJECT)},
                cwd=self.root,
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
        return self.done[text]


@pytest.fixture(scope="module")
def checkout(project, study_texts, tmp_path_factory) -> Checkout:
    root = tmp_path_factory.mktemp("checkout")
    data = project.copy(root / "data").data
    for name, text in study_texts.items():
        (data / "studies" / f"{name}.yaml").write_text(text, "utf-8")
    command = root / "bin" / "persona-assets"
    command.parent.mkdir()
    command.write_text(SHIM, "utf-8")
    command.chmod(0o755)
    return Checkout(root, {})


@pytest.fixture(scope="module")
def local_copies(checkout, arc_dir, tokenizer_dir) -> None:
    """The first published questions, and the tokenizer, where the pages have them."""
    arc = checkout.root / "data" / "arc"
    arc.mkdir()
    for name in environment.ARC_FILES:
        lines = (arc_dir / name).read_text("utf-8").splitlines(keepends=True)
        (arc / name).write_text("".join(lines[:60]), "utf-8")
    (checkout.root / "data" / "tokenizer").symlink_to(tokenizer_dir)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.text not in ELSEWHERE], ids=str)
def test_the_command_works_and_prints_what_the_page_shows(command, checkout, request):
    if environment.ARC_DIR in command.text:
        request.getfixturevalue("local_copies")
    done = checkout.run(command.text)
    assert done.returncode == 0, done.stdout + done.stderr
    if command.shown is not None:
        assert re.fullmatch(as_pattern(command.shown), done.stdout.rstrip() + "\n"), done.stdout


def test_all_that_is_run_elsewhere_is_on_the_pages():
    assert ELSEWHERE.keys() <= {command.text for command in COMMANDS}


@pytest.mark.parametrize("target", ["demo", "ui", "test", "test-vllm", "scale"])
def test_the_recipe_is_what_is_run_elsewhere(target):
    recipe = subprocess.run(
        ["make", "--dry-run", target], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    assert ELSEWHERE[f"make {target}"] in recipe.stdout


@pytest.mark.parametrize("snippet", SNIPPETS, ids=str)
def test_the_snippet_is_accepted(snippet, study_texts):
    if snippet.file == "workspace.yaml":
        (entry,) = snippet.content["load_from"]
        (mini, _) = yaml.safe_load((PROJECT / "workspace.yaml").read_text("utf-8"))["load_from"]
        name = entry["python_module"]["attribute"]
        assert entry["python_module"] == mini["python_module"] | {
            "attribute": name,
            "location_name": name,
        }
        assert any(f"data/studies/{name}.yaml" in command.text for command in COMMANDS)
        return
    before = study_texts[snippet.file.removesuffix(".yaml")]
    study = parse_study(yaml.safe_dump(merged(yaml.safe_load(before), snippet.content)))
    assert study.model_dump() != parse_study(before).model_dump()


def merged(file: dict, change: dict) -> dict:
    """``file`` with the sections of ``change`` added; lists and values replace."""
    both = {
        key: merged(file[key], value) if isinstance(value, dict) and key in file else value
        for key, value in change.items()
    }
    return file | both


def test_links_and_named_files_are_there():
    for page in PAGES:
        text = (PROJECT / page).read_text("utf-8")
        for target in re.findall(r"\]\(([^)#]+)", text):
            assert (PROJECT / page).parent.joinpath(target).exists(), (page, target)
        for name in re.findall(r"`([\w/]+\.py)`", text):
            folders = (PROJECT / "persona_assets", PROJECT / "benchmarks")
            found = [path for folder in folders for path in folder.rglob(Path(name).name)]
            assert any(str(path).endswith(f"/{name}") for path in found), (page, name)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("    persona-assets run\n", "say what the block is"),
        ("```bash\npersona-assets run\n```", "a block of kind 'bash'"),
        ("```\npersona-assets run\n```", "a block of kind ''"),
        ("```text\n$ persona-assets run\n```", "a command in a text block"),
        ("```console\npersona-assets run\n```", "starts with `[$] `"),
        ("```yaml\nseeds: [1]\n```", "name the file"),
    ],
)
def test_no_command_escapes(text, why):
    with pytest.raises(UnknownBlock, match=why):
        list(read_page("page.md", text))


def test_commands_are_found_wherever_they_stand():
    text = (
        "Say `persona-assets status --why X`, not `persona-assets`.\n\n"
        "| a | `make it` |\n|---|---|\n| b | `make so` |\n\n"
        "```sh\nfalse\n```\n\n```console\n$ one\n1\n$ two\n```\n"
    )
    assert list(read_page("p.md", text)) == [
        Command("p.md", 1, "persona-assets status --why X"),
        Command("p.md", 3, "make it"),
        Command("p.md", 5, "make so"),
        Command("p.md", 7, "false\n"),
        Command("p.md", 11, "one", "1\n"),
        Command("p.md", 13, "two", ""),
    ]


def test_the_form_of_an_output():
    shown = "a     n\n----  --\nx.42  1.5\n…\nend …abc\n"
    for printed in ("a n\n- -\nx.42 20\nend abc\n", "a n\n-- --\nx.42 1\n\nmore\nend 9abc\n"):
        assert re.fullmatch(as_pattern(shown), printed), printed
    for printed in ("a n\n- -\nx.43 20\nend abc\n", "a n\n- -\nx.42 b\nend abc\n", "a n\n"):
        assert not re.fullmatch(as_pattern(shown), printed), printed
