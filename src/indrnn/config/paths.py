"""Where the configuration files are: inside the package once installed, at the top of a checkout."""

from pathlib import Path

from ..errors import UserError


def config_dir(package: Path | None = None) -> Path:
    """The absolute path of the folder with ``train.yaml``, for the package in the folder ``package`` (by default
    this one).

    Raises:
        UserError: it is neither in the package nor in the checkout around it.
    """
    package = package or Path(__file__).resolve().parents[1]
    candidates = [package / "configs"]
    # A checkout has src/indrnn and no copy in there; elsewhere a folder named configs is somebody else's.
    if package.parent.name == "src":
        candidates.append(package.parents[1] / "configs")
    for candidate in candidates:
        if (candidate / "train.yaml").is_file():
            return candidate
    raise UserError(f"no train.yaml in {' or '.join(map(str, candidates))}; install indrnn again")
