"""`adalora push`: a finished run to the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import AdaLoraError, AdapterFileError, ConfigError
from .console import open_console

PUSH_EPILOG = "Example: adalora push runs/mine me/my-adapter --private --dry-run"
_RECORDS = ("recipe.yaml", "result.json", "metrics.jsonl", "ranks.jsonl", "ranks.png", "budget.png", "report.html")
_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def push(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    repo_id: Annotated[str, typer.Argument(metavar="USER/NAME", help="The repository; made if it does not exist.")],
    private: Annotated[bool, typer.Option("--private", help="Make it private, if it is new.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List files and sizes; upload nothing.")] = False,
) -> None:
    """Upload adapter, model card and records to the hub, with the token of `hf auth login`.

    The recipe goes along as it is, with the paths of your data files in it.
    """
    if not _NAME.fullmatch(repo_id):
        raise ConfigError(f"the repository is {repo_id!r}; give USER/NAME, such as me/my-adapter.")
    files = files_to_push(folder, repo_id)
    console = open_console()
    for name, content in files.items():
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        console.print(f"  {name:<28} {size:>13,} bytes", markup=False)
    if dry_run:
        console.print(f"nothing was uploaded to {repo_id}", markup=False)
        return
    console.print(f"uploaded: {_upload(files, repo_id, private)}", markup=False)


def files_to_push(folder: Path, repo_id: str) -> dict[str, Path | bytes]:
    """Name in the repository → file or content. The adapter lies at the top, where readers look for it.

    Raises AdapterFileError for a folder without a finished run.
    """
    card, adapter = folder / "README.md", folder / "adapter"
    if not (card.is_file() and (folder / "result.json").is_file() and adapter.is_dir()):
        raise AdapterFileError(f"{str(folder)!r} holds no finished run, with adapter/, result.json and README.md.")
    files: dict[str, Path | bytes] = {path.name: path for path in sorted(adapter.iterdir()) if path.is_file()}
    files["README.md"] = hub_card(card.read_text(encoding="utf-8"), repo_id).encode()
    return files | {name: folder / name for name in _RECORDS if (folder / name).is_file()}


def hub_card(text: str, repo_id: str) -> str:
    """The run's card, whose program finds the adapter at the top of a copy of the repository."""
    text = text.replace("In this folder:", f"In a copy of this repository (`hf download {repo_id} --local-dir .`):")
    return text.replace('"adapter"', '"."')


def _upload(files: dict[str, Path | bytes], repo_id: str, private: bool) -> str:
    """One commit; returns its address. Raises AdapterFileError with what the hub says."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    transport: Any = HfHubHTTPError.__bases__[0]  # of the HTTP client, which differs between versions
    api: Any = HfApi(library_name="adalora")
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    try:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        return str(
            api.create_commit(repo_id, operations, commit_message="Upload an adapter trained by adalora").commit_url
        )
    except LocalTokenNotFoundError as error:
        raise AdapterFileError("the hub asks who you are: log in with `hf auth login`, or set HF_TOKEN.") from error
    except (HfHubHTTPError, transport, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise _refused(repo_id, reason) from error


def _refused(repo_id: str, reason: str) -> AdaLoraError:
    return AdapterFileError(
        f"the hub did not take {repo_id!r}: {reason} Look at the name, at the rights of your token (`hf auth whoami`), "
        "and at the network."
    )
