"""The command line as a process sees it: exit codes, one clear line for a mistake, no torch for --help."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import adalora
from adalora import cli
from adalora.commands.console import free_folder
from adalora.recipe import recipe_names
from folders import rows, save_bert, write

COMMANDS = (
    *(
        "plan",
        "train",
        "demo",
        "recipes",
        "config",
        "evaluate",
        "predict",
        "export",
        "merge",
        "squeeze",
        "push",
        "inspect",
    ),
    *("report", "compare"),
)


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["adalora", *arguments])
    return cli.run_app()


def test_help_lists_the_commands_and_imports_no_torch() -> None:
    code = "import sys; sys.argv = ['adalora', '--help']; from adalora.__main__ import main\ntry: main()\n"
    code += "finally: sys.stderr.write(str(sorted({'torch', 'pydantic', 'yaml', 'transformers'} & set(sys.modules))))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(f" {command} " in done.stdout for command in COMMANDS)
    assert done.stderr == "[]"


@pytest.mark.slow
def test_help_answers_within_four_tenths_of_a_second() -> None:
    """Of the processor's time, which other people's jobs do not stretch as much as the clock's."""
    times = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "adalora", "--help"], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(times) <= 0.4


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS), ("recipes", "copy"), ("config", "check")])
def test_every_help_fits_a_screen_and_shows_an_example(
    command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    assert call(monkeypatch, *command, "--help") == 0
    text = capsys.readouterr().out
    assert len(text.strip("\n").splitlines()) <= 40
    assert max(map(len, text.splitlines())) <= 100
    if command != ("config",):
        name = " ".join(command)
        assert f"adalora {name}".rstrip() in " ".join(text.split("Usage:")[1].split("\n", 1)[1].split())


def complete(typed: list[str]) -> list[str]:
    words = {"COMP_WORDS": " ".join(["adalora", *typed]), "COMP_CWORD": str(len(typed))}
    environment = os.environ | {"_ADALORA_COMPLETE": "complete_bash"} | words
    code = "import sys; sys.argv = ['adalora']; from adalora.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    return done.stdout.split()


@pytest.mark.slow
def test_the_shell_completes_commands_and_recipe_names() -> None:
    assert complete(["pre"]) == ["predict"]
    assert complete(["train", "text-"]) == ["text-classification"]
    assert complete(["recipes", "copy", "docstrings"]) == ["docstrings", "docstrings-lora"]


def test_a_core_install_says_what_the_command_line_needs() -> None:
    code = "import sys; sys.modules['typer'] = None; from adalora.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == "adalora: the command line needs 'typer': pip install \"adalora[hf]\""


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["train", "nowhere.yaml"], "neither a recipe file nor a built-in recipe"),
        (["train", "text-classification", "--set", "data.trian=x"], "did you mean 'train'"),
        (["train", "text-classification"], "no such file"),
        (["train", "text-classification", "--set", "nonsense"], "section.key=value"),
        (["train"], "Missing argument"),
        (["tarin"], "No such command"),
        (["train", "text-classification", "--seed", "x"], "as an integer"),
        (["train", "text-classification", "--resume"], "holds no run that was interrupted"),
        (["evaluate", "nowhere"], "is no folder"),
        (["evaluate", ".", "--data", "x", "--split", "test"], "give one of them"),
        (["predict", "."], "holds no adapter"),
        (["predict", ".", "text", "--file", "x"], "give one of them"),
        (["inspect", "."], "holds no adapter"),
        (["export", ".", "--format", "gguf", "--out", "x"], "lora-padded"),
        (["merge", "nowhere", "--out", "x"], "is no folder"),
        (["plan", "nowhere.yaml"], "give a recipe, or a model's hub name or folder"),
        (["plan", "text-classification", "--target-r", "1,x"], "--target-r holds 'x'"),
        (["plan", ".", "--task", "clasification"], "known are classification"),
        (["compare", "nowhere"], "runs: [FOLDER"),
        (["compare", "."], "no run has finished there"),
        (["push", ".", "name"], "give USER/NAME"),
        (["push", ".", "me/name"], "holds no finished run"),
        (["report", "."], "the folder of a run that began to train"),
        (["recipes", "copy", "text-clasification"], "did you mean 'text-classification'"),
        (["config", "check", "text-classification", "--set", "training.learning_rat=1"], "learning_rate"),
        (["demo", "--digits", "--set", "seed=1"], "leave out --set and --out"),
        (["demo", "--digits", "--out", "x"], "leave out --set and --out"),
        (["demo", "--set", "training.learning_rat=1"], "learning_rate"),
        (["demo", "--set", "method.init_r=8"], "method lora has no option 'init_r'"),
    ],
)
def test_a_mistake_is_one_message_with_exit_code_2(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *arguments) == 2
    screen = capsys.readouterr()
    assert message in " ".join((screen.err + screen.out).split())
    assert "Traceback" not in screen.err + screen.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE"])
@pytest.mark.parametrize("out", [[], ["--out", "ddp"]], ids=["runs", "out"])
def test_train_under_a_launcher_of_several_processes_is_refused_before_any_folder_appears(
    variable: str,
    out: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(variable, "2")
    made, mkdir = [], Path.mkdir

    def seen(self: Path, *arguments: Any, **options: Any) -> None:
        made.append(self.absolute())
        mkdir(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", seen)
    for command in (["train", "text-classification", *out], ["demo"], ["config", "check", "text-classification"]):
        assert call(monkeypatch, *command) == 2
        said = " ".join(capsys.readouterr().err.split())
        assert f"{variable} is 2" in said and "in one process" in said and "docs/scale.md" in said
    assert [path for path in made if tmp_path in path.parents] == [] == list(tmp_path.iterdir())


def test_a_demo_never_replaces_a_folder_that_is_no_demo(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    assert call(monkeypatch, "demo", "--out", str(tmp_path)) == 2
    assert "holds something that is no demo" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_demo_into_a_file_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("keep")
    for out in (tmp_path / "file", tmp_path / "file" / "within"):
        assert call(monkeypatch, "demo", "--out", str(out)) == 2
        assert "is a file, or within one" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "file").read_text() == "keep"


def test_version_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"adalora {adalora.__version__}\n"


def test_recipes_are_listed_with_what_they_are_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "recipes") == 0
    lines = capsys.readouterr().out.splitlines()
    shown = [line.split()[0] for line in lines]
    assert sorted(shown) == recipe_names()
    assert shown == sorted(shown, key=lambda name: ("/" in name, name))
    assert all(len(line.split()) >= 3 and line.endswith(".") and " # " not in line for line in lines)


def test_help_of_train_shows_an_example_and_the_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "train", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "adalora train text-classification --set" in text and "Exit codes: 0 done" in text


def test_runs_get_the_next_free_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert free_folder("a") == Path("runs/a") and Path("runs/a").is_dir()
    (tmp_path / "runs" / "a-2").mkdir()
    assert free_folder("a") == Path("runs/a-3")


def test_train_ends_with_scores_heat_map_and_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    save_bert(tmp_path / "bert")
    train, test = write(tmp_path / "train.csv", rows(32)), write(tmp_path / "test.parquet", rows(8, seed=1))
    files = [f"model.name_or_path={tmp_path / 'bert'}", f"data.train={train}", f"data.test={test}"]
    settings = [item for setting in (*files, "training.max_steps=3") for item in ("--set", setting)]
    out = tmp_path / "out"
    assert call(monkeypatch, "train", "text-classification", *settings, "--out", str(out), "--seed", "5") == 0
    screen = capsys.readouterr().out
    assert "accuracy" in screen and f"everything is in {out}" in screen
    assert "query" in screen and "output.dense" in screen
    assert "seed: 5" in (out / "recipe.yaml").read_text()


def started(tmp_path: Path, *more: str, **options: Any) -> subprocess.Popen[str]:
    save_bert(tmp_path / "bert")
    train = write(tmp_path / "train.jsonl", rows(64))
    files = [f"model.name_or_path={tmp_path / 'bert'}", f"data.train={train}", f"data.validation={train}", *more]
    settings = [item for setting in files for item in ("--set", setting)]
    command = [sys.executable, "-m", "adalora", "train", "text-classification", *settings, "--out", "out"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=tmp_path, **(pipes | options))


@pytest.mark.slow
@pytest.mark.parametrize("number,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_to_a_real_process_saves_and_exits_as_the_shell_expects(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    process = started(tmp_path, "training.num_train_epochs=5000")
    records = tmp_path / "out" / "metrics.jsonl"
    for _ in range(1200):
        if records.exists() and records.read_text().count("\n") >= 2:
            break
        time.sleep(0.1)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert "the budget was enforced at once" in " ".join(errors.split())
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_a_reader_that_leaves_early_does_not_cost_the_adapter(tmp_path: Path) -> None:
    process = started(tmp_path, "training.max_steps=3")
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline()
    process.stdout.close()
    with process.stderr:
        errors = process.stderr.read()
    assert process.wait(timeout=60) == 0, errors
    assert "Error" not in errors
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()
    assert (tmp_path / "out" / "result.json").exists()


@pytest.mark.slow
def test_a_locale_without_the_characters_of_a_label_loses_no_run(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    process = started(tmp_path, "training.max_steps=3", env=environment)
    screen, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "budget 48 ? 48" in screen  # the arrow
