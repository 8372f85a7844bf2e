"""Mutated copies of the libraries of a CMake build, by its own commands in a tree of their own."""

from __future__ import annotations

import functools
import hashlib
import json
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Command:
    """A compiler's or linker's command line, the folder that it runs in, and what it makes."""

    arguments: tuple[str, ...]
    folder: Path

    @property
    def output(self) -> Path:
        """The file that it makes."""
        return (self.folder / self.arguments[self.arguments.index("-o") + 1]).resolve()


@dataclass(frozen=True, eq=False)
class Project:
    """A CMake build: how its objects are compiled and its shared libraries linked."""

    build: Path
    csrc: Path
    compiles: dict[Path, Command]  # by object
    links: dict[str, Command]  # by the name of the library

    @classmethod
    def read(cls, build: Path, csrc: Path) -> Project:
        """Read a build made with CMAKE_EXPORT_COMPILE_COMMANDS.

        Raises:
            FileNotFoundError: there is no such build.
        """
        database = build / "compile_commands.json"
        if not database.is_file():
            raise FileNotFoundError(f"mutation needs a CMake build with {database.name} in {build}")
        commands = [
            Command(tuple(shlex.split(entry["command"])), Path(entry["directory"]))
            for entry in json.loads(database.read_text())
        ]
        compiles = {command.output: command for command in commands}
        links = {
            command.output.name: command
            for command in _link_commands(build)
            if command.output.exists()
        }
        return cls(build, csrc, compiles, links)

    def users(self, source: Path) -> list[Path]:
        """The objects of the shared libraries that depend on a source."""
        linked = {path for name in self.links for path in self.objects(name)}
        return sorted(path for path in linked if source in self._sources(path))

    def objects(self, library: str) -> list[Path]:
        """The objects of a library."""
        command = self.links[library]
        paths = [(command.folder / each).resolve() for each in command.arguments]
        return [path for path in paths if path in self.compiles]

    @functools.cache  # noqa: B019
    def _sources(self, compiled: Path) -> set[Path]:
        command = self.compiles[compiled]
        drop = command.arguments.index("-o")
        arguments = [*command.arguments[:drop], *command.arguments[drop + 2 :], "-MM"]
        text = subprocess.check_output(arguments, cwd=command.folder, text=True)
        words = text.replace("\\\n", " ").split(":", 1)[1].split()
        return {(command.folder / word).resolve() for word in words}


def _link_commands(build: Path) -> list[Command]:
    if (build / "build.ninja").exists():
        listing = subprocess.check_output(["ninja", "-t", "commands", "all"], cwd=build, text=True)
        lines = [(line, build) for line in listing.splitlines()]
    else:
        scripts = build.rglob("link.txt")
        # CMakeFiles/<target>.dir/link.txt runs in the folder of CMakeFiles.
        lines = [(script.read_text(), script.parents[2]) for script in scripts]
    commands = []
    for line, folder in lines:
        arguments = shlex.split(line)
        if "-shared" in arguments and "-o" in arguments:
            # Ninja says ": && <command> && :".
            arguments = [word for word in arguments if word not in (":", "&&")]
            commands.append(Command(tuple(arguments), folder))
    return commands


class Workspace:
    """A copy of the sources, and the objects and libraries that are made of it."""

    def __init__(self, project: Project, folder: Path) -> None:
        self.project = project
        self.csrc = folder / "csrc"
        self.objects_folder = folder / "objects"
        self.libraries = folder / "libraries"
        shutil.copytree(project.csrc, self.csrc)
        self.objects_folder.mkdir()
        self.libraries.mkdir()
        for name, command in project.links.items():
            (self.libraries / name).symlink_to(command.output)

    def write(self, source: Path, text: str) -> None:
        """Give a source, named by its place in the project, another text."""
        (self.csrc / source.relative_to(self.project.csrc)).write_text(text)

    def compile(self, compiled: Path) -> str | None:
        """Compile an object of the project here; a digest of its code, or None for an error."""
        command, target = self.project.compiles[compiled], self._object(compiled)
        arguments = [
            word.replace(str(self.project.csrc), str(self.csrc)) for word in command.arguments
        ]
        arguments[arguments.index("-o") + 1] = str(target)
        # Neither warnings nor the place of this copy may make a difference.
        arguments += ["-w", f"-ffile-prefix-map={self.csrc}={self.project.csrc}"]
        result = subprocess.run(arguments, cwd=command.folder, capture_output=True, check=False)
        if result.returncode != 0:
            return None
        bare = target.with_suffix(".bare")
        subprocess.run(["objcopy", "--strip-debug", target, bare], check=True)
        return hashlib.sha256(bare.read_bytes()).hexdigest()

    def link(self, library: str, compiled: list[Path]) -> None:
        """Link a library with these of its objects from here, the others from the project."""
        command, target = self.project.links[library], self.libraries / library
        arguments = list(command.arguments)
        for index, word in enumerate(arguments):
            path = (command.folder / word).resolve()
            if path in compiled:
                arguments[index] = str(self._object(path))
        arguments[arguments.index("-o") + 1] = str(target)
        target.unlink()
        subprocess.run(arguments, cwd=command.folder, capture_output=True, check=True)

    def unlink(self, library: str) -> None:
        """Put the project's own library back."""
        (self.libraries / library).unlink()
        (self.libraries / library).symlink_to(self.project.links[library].output)

    def _object(self, compiled: Path) -> Path:
        return self.objects_folder / hashlib.sha256(str(compiled).encode()).hexdigest()[:16]
