"""The wheel, the imports and their direction."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PACKAGES = {"lstm_triton": ROOT / "lstm_triton", "lstm_triton.kernels": ROOT / "kernels"}
SHIPPED = ROOT / "lstm_triton" / "planning" / "shipped"


def run(code: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | env
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=environment)


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Of a copy, since a build writes beside the sources, and with what is installed, since an index may not answer."""
    folder, copy = (tmp_path_factory.mktemp(name) for name in ("dist", "copy"))
    for source in (ROOT / "lstm_triton", ROOT / "kernels", ROOT / "tests"):
        shutil.copytree(source, copy / source.name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return next(folder.glob("*.whl")), next(folder.glob("*.tar.gz"))


def test_wheel_and_sdist(distributions: tuple[Path, Path]) -> None:
    """The wheel is built from the sdist; it holds every module of the two folders and nothing else."""
    wheel, sdist = distributions
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        f"lstm_triton/{path.relative_to(ROOT / 'lstm_triton')}" for path in (ROOT / "lstm_triton").rglob("*.py")
    }
    expected |= {f"lstm_triton/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    shipped = {f"lstm_triton/planning/shipped/{path.name}" for path in SHIPPED.glob("*.json")}
    assert names == expected | shipped | {"lstm_triton/py.typed"}
    with tarfile.open(sdist) as archive:
        packed = archive.getnames()
    assert any(name.endswith("LICENSE") for name in packed)
    assert any(name.endswith("lstm_triton/kernels/forward.py") for name in packed)
    assert not [name for name in packed if "/tests/" in name], "they would not run without the rest of the checkout"


def test_the_wheel_runs_where_it_is_unpacked(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    zipfile.ZipFile(distributions[0]).extractall(tmp_path)
    code = "import lstm_triton, lstm_triton.kernels.forward, torch; print(lstm_triton.__file__); print(lstm_triton.LSTM(3, 4)(torch.ones(2, 1, 3))[0].shape)"  # fmt: skip
    done = run(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout


@pytest.mark.parametrize("way", ["not installed", "pip install .", "pip install -e ."])
def test_a_checkout_can_be_imported_from_inside(way: str, distributions: tuple[Path, Path], tmp_path: Path) -> None:
    """However it is installed, the kernels are there; what a newcomer does first."""
    site = tmp_path / "site"  # the environment's packages without its own link to the checkout
    site.mkdir()
    for path in Path(torch.__file__).parents[1].iterdir():
        if "lstm_triton" not in path.name:
            (site / path.name).symlink_to(path)
    if way == "pip install .":
        zipfile.ZipFile(distributions[0]).extractall(site)
    paths = [str(site)] + [str(ROOT)] * (way == "pip install -e .")
    code = "import lstm_triton.kernels.forward as f, lstm_triton as l, torch; print(f.__file__, l.LSTM(3, 4)(torch.ones(2, 1, 3))[0].shape)"  # fmt: skip
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    )
    assert done.returncode == 0, done.stderr
    assert str(ROOT / "lstm_triton" / "kernels" / "forward.py") in done.stdout


def test_kernels_is_no_top_level_package() -> None:
    done = run("import kernels", cwd=ROOT)
    assert "ImportError: import lstm_triton.kernels, not kernels" in done.stderr


def test_packages_are_listed() -> None:
    import tomllib

    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "lstm_triton").rglob("__init__.py")}
    assert listed == found | {"lstm_triton.kernels"}


def imports_of(path: Path, package: str) -> set[str]:
    """Absolute names of what a module imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            name = ".".join(filter(None, (base, node.module)))
            found |= {name} | {f"{name}.{alias.name}" for alias in node.names}
    return found


def modules(folder: Path, package: str):
    for path in folder.rglob("*.py"):
        inner = ".".join((package, *path.parent.relative_to(folder).parts))
        yield path, imports_of(path, inner)


def test_imports_point_one_way() -> None:
    for path, found in modules(PACKAGES["lstm_triton.kernels"], "lstm_triton.kernels"):
        own = {name for name in found if name.startswith("lstm_triton")}
        assert all(name.startswith("lstm_triton.kernels") for name in own), f"{path} imports {own}"
        allowed = {"torch", "triton", "lstm_triton"} | set(sys.stdlib_module_names)
        assert {name.split(".")[0] for name in found} <= allowed, path
    outside = {"tests", "perf", "notebooks", "pytest", "hypothesis"}
    for package, folder in PACKAGES.items():
        for path, found in modules(folder, package):
            assert not {name.split(".")[0] for name in found} & outside, path


EXTRAS = ("recipes/", "testing/", "diagnostics/figure.py", "diagnostics/drawing.py")  # imported when they are needed


def test_only_recipes_and_figures_need_more_than_the_dependencies() -> None:
    import re

    import tomllib

    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    declared = {re.split(r"[<>=]", requirement)[0] for requirement in wanted}
    used = set()
    for path, found in modules(PACKAGES["lstm_triton"], "lstm_triton"):
        others = {name.split(".")[0] for name in found} - {"lstm_triton"} - set(sys.stdlib_module_names)
        if not path.relative_to(ROOT / "lstm_triton").as_posix().startswith(EXTRAS):
            used |= others
            assert others <= declared, f"{path} imports {others}"
    assert used == declared


def test_only_the_settings_read_the_environment() -> None:
    for folder in PACKAGES.values():
        for path in folder.rglob("*.py"):
            if "recipes" not in path.parts and path.name not in ("settings.py", "doctor.py"):
                assert "os.environ" not in path.read_text(), path
                assert "getenv" not in path.read_text(), path


def test_importing_touches_no_gpu_and_stays_small() -> None:
    """TorchDynamo alone would add a second; torch itself does not import it."""
    code = "import sys, torch, lstm_triton; assert not torch.cuda.is_initialized(); print(*sys.modules)"
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert not {"torch._dynamo", "torch._inductor", "matplotlib"} & set(done.stdout.split())


def test_files_are_small() -> None:
    """A room, not a hall: about 300 lines at most."""
    for folder in PACKAGES.values():
        for path in folder.rglob("*.py"):
            assert len(path.read_text().splitlines()) <= 350, path


def test_versions_agree() -> None:
    import importlib.metadata

    import lstm_triton

    assert importlib.metadata.version("lstm_triton") == lstm_triton.__version__
    assert f"## {lstm_triton.__version__}" in (ROOT / "CHANGELOG.md").read_text()
