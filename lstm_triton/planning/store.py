"""Where tables come from: tuned by the user, in the cache folder, and shipped inside the package.

One file per GPU model; the user's entries go before the shipped ones. A file that is corrupt, of
another format or for other kernels is left alone and warned about once.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch

from .device import Device
from .memory import forget
from .problem import Bucket
from .settings import AUTOTUNE, CACHE_DIR, cache_dir
from .table import NO_TABLE, Entry, Table, TableError, kernels_hash, load, parse

SHIPPED = Path(__file__).parent / "shipped"
_IN_USE: dict[Device, Table] = {}  # goes before the files: `using`, and a table that could not be written
logger = logging.getLogger("lstm_triton")


def file_name(device: Device) -> str:
    """ "NVIDIA H200", 132 multiprocessors -> "nvidia-h200-132.json": a part of a GPU is another device."""
    return f"{re.sub('[^a-z0-9]+', '-', device.name.lower()).strip('-')}-{device.multiprocessors}.json"


def user_path(device: Device) -> Path:
    return cache_dir() / "tables" / file_name(device)


def active_table(device: Device) -> Table:
    """The table that plans for this device come from, by LSTM_TRITON_AUTOTUNE and what there is."""
    if device in _IN_USE:
        return _IN_USE[device]
    if AUTOTUNE.read() == "off" or device.arch == "interpreter":
        return NO_TABLE
    return _found(device, CACHE_DIR.read(), is_shared())


@contextlib.contextmanager
def using(table: Table, device: Device) -> Iterator[None]:
    """Within the block, plans for the device come from this table."""
    before = _IN_USE.get(device)
    _IN_USE[device] = table
    forget()
    try:
        yield
    finally:
        del _IN_USE[device]
        if before is not None:
            _IN_USE[device] = before
        forget()


@lru_cache(maxsize=64)
def _found(device: Device, folder: str, shared: bool) -> Table:
    """What `active_table` found while the variables said the same."""
    tables = [
        table
        for path in (user_path(device), SHIPPED / file_name(device))
        if (table := read(path, device)) is not NO_TABLE
    ]
    found = tables[0].over(tables[1]) if len(tables) == 2 else tables[0] if tables else NO_TABLE
    return agreed(found, device) if shared else found


def read(path: Path, device: Device) -> Table:
    """The table of a file if it speaks for the device; otherwise none, and a warning."""
    try:
        table = load(path)
        problem = table.mismatch(device)
    except (FileNotFoundError, NotADirectoryError):
        return NO_TABLE
    except (OSError, TableError) as error:
        problem = str(error)
    if problem:
        logger.warning("the tuned table %s is ignored: %s", path, problem)
        return NO_TABLE
    return table


def new_table(device: Device, made: dict[str, str]) -> Table:
    return Table(Path(file_name(device)).stem, kernels_hash(), device.name, device.arch, device.multiprocessors, made)


def keep(bucket: Bucket, entry: Entry, device: Device) -> None:
    """Add to the user's table; where it cannot be written, or is not ours to write, for this process only."""
    added = {bucket: entry}
    try:
        mine = load(user_path(device))
        problem = mine.mismatch(device)
    except FileNotFoundError:
        mine, problem = new_table(device, {}), ""
    except (OSError, TableError) as error:
        mine, problem = NO_TABLE, str(error)
    if not problem:
        try:
            replace(mine, entries={**mine.entries, **added}).save(user_path(device))
        except OSError as error:
            problem = str(error)
    if problem:
        logger.warning("the tuned table is not written, what was tuned is kept for this process only: %s", problem)
        _IN_USE[device] = replace(new_table(device, {}), entries=added).over(active_table(device))
    _found.cache_clear()
    forget()


def is_shared() -> bool:
    """Whether several ranks run this program."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def agreed(table: Table, device: Device) -> Table:
    """One table for all ranks with this GPU: that of the first one to ask, whatever the others' files say.

    Through the process group's store and not by a collective: a rank that runs no LSTM must not be
    waited for.
    """
    store_of_group = torch.distributed.distributed_c10d._get_default_store
    key = f"lstm_triton/table/{file_name(device)}/{kernels_hash()}"
    try:
        text = store_of_group().compare_set(key, "", f"{table.name}\n{table.dump()}").decode()
    except (RuntimeError, ValueError) as error:  # not every store can; every rank then finds the same
        logger.warning("no tuned table is used: the ranks cannot agree on one: %s", str(error).partition("\n")[0])
        return NO_TABLE
    name, _, text = text.partition("\n")
    return parse(text, f"{name}, as on every rank")
