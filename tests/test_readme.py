"""What README and docs say can be run, runs; what they point to exists."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def test_the_quickstart_of_the_readme_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = blocks(ROOT / "README.md", "python")[0]
    assert len([line for line in code.splitlines() if "adalora." in line]) >= 6
    (tmp_path / "quickstart.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path("quickstart.py")
    assert names["loss"].item() < 0.5
    assert {path.name for path in Path("out").iterdir()} == {"adapter", "lora"}


def test_the_tree_in_the_readme_is_the_tree() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    files = {path.name for path in (ROOT / "src" / "adalora").glob("*.py")} - {"__init__.py", "__main__.py"}
    folders = {f"{path.name}/" for path in (ROOT / "src" / "adalora").iterdir() if (path / "__init__.py").exists()}
    missing = {name for name in files | folders if not re.search(rf"(^|\s){re.escape(name)}(\s|$)", text, re.M)}
    assert missing == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_every_command_in_the_docs_exists() -> None:
    from adalora.cli import app

    commands = {command.callback.__name__ for command in app.registered_commands if command.callback}
    commands |= {group.name for group in app.registered_groups if group.name}
    used = {match for page in PAGES for match in re.findall(r"^adalora ([a-z]+)", page.read_text("utf-8"), re.M)}
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    made = {match for page in PAGES for match in re.findall(r"`?make ([a-z]+)", page.read_text("utf-8"))}
    assert used <= commands
    assert {"demo", "test"} <= made <= targets | {"a", "it", "of"}


@pytest.mark.slow
@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.stem)
def test_every_example_runs_and_is_short(example: Path, tmp_path: Path) -> None:
    assert len(example.read_text().splitlines()) <= 60
    done = subprocess.run([sys.executable, str(example)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "rank" in done.stdout or "query" in done.stdout
