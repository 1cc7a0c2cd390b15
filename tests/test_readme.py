"""What the documents point at exists."""

import re
import textwrap
from pathlib import Path

import pytest
import typer.main

from lpvit_edge.cli import app

ROOT = Path(__file__).parent.parent
DOCUMENTS = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "examples").rglob("README.md")),
    ROOT / "engines" / "native" / "README.md",
]
ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:|#|//")  # another scheme, a heading, another host


def links(text: str) -> list[str]:
    """Targets of Markdown links and images, of reference definitions and of HTML attributes."""
    inline = re.findall(r"\]\(\s*<?([^)\s>]+)", text)
    references = re.findall(r"^ {0,3}\[[^\]]+\]:\s*<?([^\s>]+)", text, flags=re.MULTILINE)
    html = re.findall(r"""\b(?:src|href|srcset)=["']([^"']+)""", text)
    return [*inline, *references, *html]


def relative_files(text: str) -> list[str]:
    """The link targets that are files beside the document, without their #heading."""
    return [link.partition("#")[0] for link in links(text) if not ELSEWHERE.match(link)]


def verbs(text: str) -> set[str]:
    """The words after `lpvit` where it is a command: after a backtick or in a command line."""
    return set(re.findall(r"(?:`|^ *(?:\$ )?)lpvit ([a-z][a-z-]*)", text, flags=re.MULTILINE))


@pytest.mark.parametrize("path", DOCUMENTS, ids=[str(p.relative_to(ROOT)) for p in DOCUMENTS])
def test_every_relative_link_resolves_to_a_file(path: Path) -> None:
    targets = relative_files(path.read_text(encoding="utf-8"))
    assert [name for name in targets if not (path.parent / name).is_file()] == []


def test_every_verb_that_the_readme_names_exists() -> None:
    named = verbs((ROOT / "README.md").read_text(encoding="utf-8"))
    known = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert "optimize" in named
    assert named - known == set()


def options_named(text: str) -> set[tuple[str, str]]:
    """(verb, option) of each command in a code line or between backticks."""
    found = re.findall(r"(?:`|^ +(?:\$ )?)lpvit ([a-z][a-z-]*)([^`#\n]*)", text, flags=re.MULTILINE)
    return {
        (verb, option) for verb, rest in found for option in re.findall(r"(?<= )--[a-z-]+", rest)
    }


@pytest.mark.parametrize("path", DOCUMENTS, ids=[str(p.relative_to(ROOT)) for p in DOCUMENTS])
def test_every_option_that_a_document_names_exists(path: Path) -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    known = {
        (verb, option)
        for verb, command in commands.items()
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
    } | {(verb, "--help") for verb in commands}
    assert options_named(path.read_text(encoding="utf-8")) - known == set()


def test_the_jetsons_commands_and_its_program_are_looked_at() -> None:
    text = (ROOT / "examples/jetson/README.md").read_text(encoding="utf-8")
    assert {("install", "--rebuild"), ("build", "--python-free")} <= options_named(text)
    program = textwrap.dedent(text.partition("<<'PY'\n")[2].partition("    PY\n")[0])
    assert "load_engine" in compile(program, "README", "exec").co_names


def test_links_are_found_in_each_of_their_forms() -> None:
    text = '![a](a.png) [b](b.md#c "B") [d](https://d) [e](#f)\n[g]: g.md\n<img src="h.png">\n'
    assert relative_files(text) == ["a.png", "b.md", "g.md", "h.png"]


def test_verbs_are_found_in_code_and_in_command_lines_alone() -> None:
    text = "`lpvit one --help`, `lpvit --help`; an lpvit run\n    lpvit two x.toml\n$ lpvit three\n"
    assert verbs(text) == {"one", "two", "three"}
