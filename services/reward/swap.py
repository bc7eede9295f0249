"""Which models may take over from the one that serves, by the names that come over the wire."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from services.reward.config import RewardSettings
from services.reward.metadata import ensemble_members
from services.runtime.errors import FailedPreconditionError, InvalidArgumentError, StartError

# Messages repeat the name, and travel in headers, which are few kilobytes.
_LONGEST_NAME = 1024


@dataclass(frozen=True, kw_only=True)
class SwapSources:
    """What the operator allowed: folders below ``models_dir``, and ``names`` exactly as they are.

    The model that the service was started with may come back whenever anything is allowed at all.
    """

    models_dir: Path | None
    names: tuple[str, ...]
    start_model: str
    start_revision: str | None

    @classmethod
    def of(cls, settings: RewardSettings) -> SwapSources:
        """
        Raises:
            StartError: models_dir is no folder.
        """
        if settings.models_dir is not None and not settings.models_dir.is_dir():
            raise StartError(f"--models-dir is {str(settings.models_dir)!r}: there is no such folder")
        return cls(
            models_dir=settings.models_dir,
            names=tuple(settings.allow_swap_from),
            start_model=settings.model,
            start_revision=settings.revision,
        )

    def resolve(self, model: str, revision: str) -> tuple[str, str | None]:
        """Model and revision to load: a hub id, or a folder with all symbolic links followed.

        Raises:
            FailedPreconditionError: nothing is allowed.
            InvalidArgumentError: the name is none of what is allowed, or leads out of ``models_dir``, or a member of
                the ensemble that it names does.
            StartError, ModelFolderError: the folder's quartet.json is not usable.
        """
        if self.models_dir is None and not self.names:
            raise FailedPreconditionError(
                "this service does not swap its model: start it with --models-dir FOLDER, below which the new models "
                "lie, or with --allow-swap-from NAME"
            )
        if not model or len(model) > _LONGEST_NAME or "\0" in model:
            raise _wrong(f"model is {model[:100]!r}: must be a name of 1 to {_LONGEST_NAME} characters without NUL")
        if model in self.names or model == self.start_model:
            if revision and (model.startswith((".", "/", "~")) or Path(model).expanduser().exists()):
                raise InvalidArgumentError(
                    f"revision is {revision[:100]!r}, but model {model!r} is a folder, which has none", field="revision"
                )
            return model, revision or (self.start_revision if model == self.start_model else None)
        if self.models_dir is None:
            raise _wrong(f"model is {model[:100]!r}: not one of those allowed by --allow-swap-from")
        if revision:
            raise InvalidArgumentError(
                f"revision is {revision[:100]!r}, but a folder below the models directory has none", field="revision"
            )
        folder = _folder_below(self.models_dir, model)
        top = self.models_dir.resolve()
        for member in ensemble_members(str(folder)) or ():
            place = Path(member).resolve()
            if not place.is_relative_to(top):
                raise _wrong(f"model is {model[:100]!r}: its member {member!r} lies outside the models directory")
            _folder_below(top, str(place.relative_to(top)))
        return str(folder), None


def _folder_below(models_dir: Path, model: str) -> Path:
    shown = model[:100]
    if ".." in Path(model).parts:
        raise _wrong(f"model is {shown!r}: a name may not contain '..'")
    try:
        top = models_dir.resolve()
        folder = (top / model).resolve()
        if folder == top or not folder.is_relative_to(top):
            raise _wrong(f"model is {shown!r}: not a folder below the service's models directory")
        folder.exists()  # Raises where the name can be none at all.
        for place, folders, files in os.walk(folder):
            for path in (Path(place, name) for name in (*folders, *files)):
                if path.is_symlink() and not path.resolve().is_relative_to(top):
                    raise _wrong(f"model is {shown!r}: {path.name!r} in it leads out of the service's models directory")
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: symbolic links in a circle.
        raise _wrong(f"model is {shown!r}: not a folder that can be read") from error
    return folder


def _wrong(message: str) -> InvalidArgumentError:
    return InvalidArgumentError(message, field="model")
