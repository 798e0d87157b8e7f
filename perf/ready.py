"""What this machine lacks to run perf/on_gpu.sh: a line for each thing, and exit status 2 if it lacks anything.

    python perf/ready.py                  everything
    python perf/ready.py --without-gpu    all but the GPU and what compiles for it to be launched here

One more line names optional packages that are not installed, and what that costs. An old Python 3 can read this file.
"""

import argparse
import contextlib
import importlib
import importlib.util
import os
import re
import sys
import tempfile

PROJECT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "pyproject.toml")
OPTIONAL = {
    "xdist": "pytest-xdist: tests run one after another",
    "tqdm": "tqdm: no progress bars",
    "matplotlib": "matplotlib: no figures, which any other machine draws from the rows",
}


def needed(name):
    """The lower bound in pyproject.toml of Python or a package, as numbers; () if there is none."""
    with open(PROJECT) as file:
        pattern = "requires-python = " if name == "python" else f'"{name}'
        found = re.search(pattern + r'"?>=([\d.]+)', file.read())
    return numbers(found.group(1)) if found else ()


def numbers(version):
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def dotted(version):
    return ".".join(map(str, version))


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def missing(gpu):
    """What is missing, in words; what can only be asked of what is missing is left out."""
    if sys.version_info[:2] < needed("python"):
        least, here = dotted(needed("python")), dotted(sys.version_info[:3])
        yield f"Python {least} or later is needed, {sys.executable} is {here} (the variable PYTHON names another)"
        return
    modules = {}
    for name in ("torch", "triton", "pytest"):
        try:
            modules[name] = importlib.import_module(name)
        except ImportError as error:
            if importlib.util.find_spec(name) is None:
                yield f"{name} is not installed: pip install {name}"
            else:
                yield f"{name} cannot be imported: {first_line(error)}"
        else:
            version = modules[name].__version__
            if numbers(version) < needed(name):
                yield f"{name} {version} is too old: {dotted(needed(name))} or later is needed"
    if gpu and "torch" in modules:
        complaint = no_gpu(modules["torch"])
        if complaint:
            yield complaint
        elif "triton" in modules:
            complaint = no_driver(modules["triton"])
            if complaint:
                yield complaint


def no_gpu(torch):
    """Why torch has no GPU; "" if it has one."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA: install a build with it"
    if torch.cuda.is_available():
        return ""
    try:
        torch.cuda.init()
    except Exception as error:
        return f"torch {torch.__version__} sees no GPU: {first_line(error)}"
    return f"torch {torch.__version__} sees no GPU"


def no_driver(triton):
    """Why Triton's driver cannot start, which compiles a little C program against Python and libcuda; "" if it can."""
    with captured() as said:
        try:
            triton.runtime.driver.active.utils  # noqa: B018
        except BaseException as error:  # whatever it is, it must become a line
            found = f"{error}\n{said()}"
        else:
            return ""
    if "Python.h" in found:
        package = f"python{dotted(sys.version_info[:2])}-dev"
        reason = f"Python.h is missing (on Debian and Ubuntu: the package {package})"
    elif "C compiler" in found:
        reason = "there is no C compiler (install gcc, or let the variable CC name one)"
    elif "libcuda" in found or "-lcuda" in found:
        reason = "libcuda.so.1 is not found (it comes with NVIDIA's driver; ldconfig -p should list it)"
    else:
        reason = first_line(found)
    return f"Triton's driver cannot start: {reason}"


@contextlib.contextmanager
def captured():
    """What this process and the compilers that it starts write to stderr; to be asked for within the block."""
    sys.stderr.flush()
    before = os.dup(2)
    with tempfile.TemporaryFile() as file:

        def said():
            file.seek(0)
            return file.read().decode(errors="replace")

        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            os.dup2(before, 2)
            os.close(before)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--without-gpu", action="store_true")
    options = parser.parse_args(arguments)
    complaints = list(missing(not options.without_gpu))
    for complaint in complaints:
        print(f"on_gpu.sh: {complaint}", file=sys.stderr)
    if complaints:
        return 2
    absent = [cost for name, cost in OPTIONAL.items() if importlib.util.find_spec(name) is None]
    if absent:
        print("not installed, and not needed: " + "; ".join(absent))
    return 0


if __name__ == "__main__":
    sys.exit(main())
