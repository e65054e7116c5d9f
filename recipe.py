"""What decided the numbers of an output: its `Recipe`, and digests and checksums of contents.

>>> made = Recipe("cube", 4, {"n_band": 2040}, {"LOGCUBE": utils.file_digest(path)})
>>> today.require(made, path, "Replace it with --overwrite")
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from utils import DataError

import numpy as np
from isal import isal_zlib

DIGEST_LENGTH = 16
"""Hexadecimal digits of a checksum in text, and of a label map's digest in the table of a split."""
PER_GALAXY = ("redshift",)
"""Options that differ from galaxy to galaxy and do not keep their products apart."""
MOST_SHOWN = 4
"""Differences that an error message names."""


@dataclass(frozen=True)
class Recipe:
    """What decided the numbers of one output."""

    product: str
    """cube, labels, split, statistics, patches, packed cubes, run, map, ..."""
    version: int
    """Of the layout and the arithmetic; raised when either changes."""
    options: dict[str, Any] = field(default_factory=dict)
    """Choices of the user, as JSON values. Options of the products that this one was made from are
    nested under the product's name, e.g. options["cube"]."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Digest of the content of each input."""

    def __post_init__(self) -> None:
        """Bring the options into the form in which they are read back from JSON."""
        object.__setattr__(self, "options", json.loads(json.dumps(self.options, default=str)))

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON form, hexadecimal."""
        return digest_of(asdict(self))

    @property
    def shared(self) -> dict[str, Any]:
        """Options that all products to be used together must have in common."""
        return {k: v for k, v in self.options.items() if k not in PER_GALAXY}

    def to_json(self) -> str:
        """Write the recipe as one line of JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str | bytes | Mapping[str, Any], where: Path | str) -> Recipe:
        """Read what `to_json` wrote (or its parsed form) from the file `where`."""
        try:
            content = json.loads(text) if isinstance(text, str | bytes) else text
            recipe = cls(**content)
            if not (isinstance(recipe.options, dict) and isinstance(recipe.inputs, dict)):
                raise TypeError("options and inputs must be objects")
            return recipe
        except (TypeError, ValueError):
            raise DataError(
                f"{where}: its recipe is damaged ({str(text)[:40]!r}); expected a JSON object with "
                "product, version, options and inputs. Rebuild the file with --overwrite."
            ) from None

    def differences(self, made: Recipe) -> list[str]:
        """Name what differs in a recorded recipe from this one, in words; empty if nothing does."""
        if (made.product, made.version) != (self.product, self.version):
            return [f"it is {made.product} version {made.version}"]
        changed = option_differences(made.options, self.options)
        names = {**self.inputs, **made.inputs}
        others = [k for k in names if made.inputs.get(k) != self.inputs.get(k)]
        return changed + [f"another {name}" for name in others]

    def require(self, made: Recipe, target: Path | str, remedy: str) -> None:
        """Raise a DataError unless an output, `target`, was made by this recipe, as it records.

        `remedy` is what to do, as a sentence without its full stop.
        """
        if changed := self.differences(made):
            raise DataError(f"{target}: made with {_some(changed)}. {remedy}.")


def option_differences(
    made: Mapping[str, Any], wanted: Mapping[str, Any], whose: str = "now"
) -> list[str]:
    """Name the options that differ, e.g. "wave_min=4800 (now 5000)"; nested ones with a dot."""
    made, wanted = flatten(made), flatten(wanted)
    names = [k for k in {**wanted, **made} if made.get(k) != wanted.get(k)]
    return [f"{k}={_shown(made.get(k))} ({whose} {_shown(wanted.get(k))})" for k in names]


def require_alike(
    made: Mapping[str, Any], wanted: Mapping[str, Any], where: Path | str, whose: str, remedy: str
) -> None:
    """Raise a DataError unless two products that are used together share their options.

    Parameters
    ----------
    made, wanted : mapping
        `Recipe.shared` of the product, and of those that it must go with.
    where : Path
        The product.
    whose : str
        Those that it must go with, in words.
    remedy : str
        What to do, as a sentence without its full stop.
    """
    if changed := option_differences(made, wanted, f"{whose}:"):
        raise DataError(f"{where}: made with {_some(changed)}. {remedy}.")


def flatten(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Bring nested options to one level, their names joined by dots."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _some(words: list[str]) -> str:
    """Join the first few words."""
    more = len(words) - MOST_SHOWN
    return ", ".join(words[:MOST_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _shown(value: Any) -> str:
    """Show an option's value; a long list by its length."""
    is_long = isinstance(value, list) and len(value) > 8
    return f"{len(value)} values" if is_long else str(value)


# Digests


def digest_of(content: Any) -> str:
    """SHA-256 of an array (type, shape and values) or of JSON values, hexadecimal."""
    if isinstance(content, np.ndarray):
        head = f"{content.dtype.str} {content.shape} ".encode()
        return hashlib.sha256(head + np.ascontiguousarray(content).tobytes()).hexdigest()
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def checksum(array: np.ndarray) -> int:
    """CRC-32 of an array: of its type and shape, then of its bytes."""
    head = isal_zlib.crc32(f"{array.dtype.str} {array.shape}".encode())
    return isal_zlib.crc32(np.ascontiguousarray(array), head)


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Add the checksum of JSON values to them."""
    plain = json.loads(json.dumps(content, default=str))
    return {**plain, "checksum": digest_of(plain)[:DIGEST_LENGTH]}


def sealed_text(text: str) -> str:
    """Put the checksum of a text into a comment before it."""
    return f"# checksum: {hashlib.sha256(text.encode()).hexdigest()[:DIGEST_LENGTH]}\n{text}"
