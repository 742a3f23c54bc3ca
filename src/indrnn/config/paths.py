"""Where the configuration files are: beside ``pyproject.toml`` in a checkout, inside the package once installed."""

from pathlib import Path

from ..errors import UserError


def config_dir() -> Path:
    """The absolute path of the folder with ``train.yaml``.

    Raises:
        UserError: neither a checkout's ``configs/`` nor the packaged copy is there.
    """
    package = Path(__file__).resolve().parents[1]
    checkout = package.parents[1]
    candidates = [package / "configs"]
    # A checkout is recognised by its pyproject.toml: site-packages may hold an unrelated folder named configs.
    if (checkout / "pyproject.toml").is_file():
        candidates.insert(0, checkout / "configs")
    for candidate in candidates:
        if (candidate / "train.yaml").is_file():
            return candidate
    raise UserError(f"no train.yaml in {' or '.join(map(str, candidates))}: install the package again")
