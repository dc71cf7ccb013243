"""The wheel that ``python -m build`` makes holds the package and nothing else, and works by itself.

It is built from an sdist of what git would commit, and installed into a new environment that sees the
libraries of this one and not the repository. The build downloads setuptools.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from diffsynth_metrics.embedded.drawing import draw_shape

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
LARGEST_BYTES = 5_000_000


def run(*command: str | Path, folder: Path) -> str:
    """Run a command as somebody does who has no repository, and return what it wrote to stdout."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=inherited | {"CUDA_VISIBLE_DEVICES": "", "DIFFSYNTH_SKIP_DOWNLOAD": "true"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


def tracked_files() -> list[Path]:
    """Return what is committed or could be: no build folders, no caches."""
    listed = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", folder=ROOT)
    return [Path(name) for name in listed.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for file in tracked_files():
        (source / file).parent.mkdir(parents=True, exist_ok=True)
        (source / file).write_bytes((ROOT / file).read_bytes())
    run(sys.executable, "-m", "build", "--outdir", built, source, folder=built)
    (wheel,) = built.glob("*.whl")
    assert len(list(built.glob("*.tar.gz"))) == 1
    return wheel


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into a new environment, and return the folder of its programs."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    programs = folder / "bin"
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        programs / "python",
        "install",
        "--no-deps",
        wheel,
        folder=folder,
    )
    (packages,) = folder.glob("lib/python*/site-packages")
    # The libraries are added without their .pth files, of which one may point to this repository.
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return programs


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    assert wheel.stat().st_size < LARGEST_BYTES
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
    assert names == {file.as_posix() for file in tracked_files() if file.parts[0] == "diffsynth_metrics"}


def test_quickstart_and_command_run_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    where = run(
        installed / "python", "-c", "import diffsynth_metrics as d; print(d.__file__)", folder=tmp_path
    )
    assert Path(where.strip()).is_relative_to(installed.parent)

    quickstart = tmp_path / "quickstart.py"
    quickstart.write_bytes((ROOT / "examples" / "quickstart.py").read_bytes())
    assert "a red circle" in run(installed / "python", quickstart, folder=tmp_path)
    assert (tmp_path / "results" / "quickstart.png").is_file()

    command = installed / "diffsynth-metrics"
    for name, color in (("before", "blue"), ("after", "red")):
        (tmp_path / name).mkdir()
        for shape in ("circle", "square", "star"):
            draw_shape(shape, color).save(tmp_path / name / f"{shape}.png")
            (tmp_path / name / f"{shape}.txt").write_text(f"a red {shape}", encoding="utf-8")
        run(command, "score", name, "--metrics", "shapes", "--out", f"runs/{name}", folder=tmp_path)
    verdict = run(
        command, "compare", "runs/before", "runs/after", "--report", "report.html", folder=tmp_path
    )
    assert "shapes" in verdict
    assert "<html" in (tmp_path / "report.html").read_text(encoding="utf-8")
