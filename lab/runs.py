"""The log folder: which runs exist, which process makes which, and files that are whole.

DIR/config.json holds what all runs have in common, DIR/runs/00000.json is a run's record, and
DIR/log.json has it all, with a summary.
"""

import hashlib
import io
import itertools
import json
import math
import os
import socket
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout

from lab.errors import UserError, first_lines
from lab.machine import is_first_process
from lab.options import flat

#### Files #########################################################################################


def write_atomically(path, content):
    """Write bytes to a temporary file, which then gets the name `path`.

    Raises UserError, with the file's name, if that fails; an older file stays as it was.
    """
    temporary = path.with_name(f'{path.name}.{socket.gethostname()}.{os.getpid()}.tmp')
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f'{path} cannot be written: {first_lines(error)}') from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def checksum(content):
    """The SHA-256 of a dict as JSON, without what it says about its own checksum."""
    others = {name: value for name, value in content.items() if name != 'checksum'}
    return hashlib.sha256(json.dumps(others).encode()).hexdigest()


def write_json(path, content):
    """Write a dict, with its checksum. Raises UserError."""
    try:
        content = content | {'checksum': checksum(content)}
        text = json.dumps(content, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f'{path} cannot be written as JSON: {first_lines(error)}') from error
    write_atomically(path, f'{text}\n'.encode())


def read_json(path):
    """The dict that `write_json` wrote, without its checksum. Older files have none.

    Raises ValueError, in a few words, if the file holds something else or was changed.
    """
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError('is not JSON') from error
    if not isinstance(content, dict):
        raise ValueError('holds no dict')
    expected = content.pop('checksum', None)
    if expected not in (None, checksum(content)):
        raise ValueError('is damaged, or was edited: it has another checksum')
    return content


def write_tensors(path, content):
    """Write tensors, in lists and dicts, like torch.save."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


#### Locks #########################################################################################

PATIENCE = 60  # seconds for a lock that others have for a moment only


@contextmanager
def locked(path, timeout=0):
    """Hold the lock on `path`, which ends with the process. Waits for `timeout` seconds.

    Raises filelock.Timeout if another process holds it, and UserError if nobody can.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=timeout)
    except Timeout:
        raise
    except (OSError, NotImplementedError) as error:
        way_out = 'choose a folder where you may write, on a file system that has locks'
        raise UserError(f'{path}: cannot be locked: {first_lines(error)}; {way_out}') from error
    try:
        yield
    finally:
        lock.release()


def is_busy(lock):
    """A line about a log that somebody else has locked, perhaps on a machine that is gone."""
    return f'--out {lock.parent}: another command is at work there; if there is none, delete {lock}'


#### Opening a log #################################################################################


def new_folder(name):
    """A folder in logs that no other command has."""
    return Path('logs', f'{time.strftime("%Y%m%d-%H%M%S")}-{name}-{os.urandom(3).hex()}')


def describe_difference(name, before, now, there, here):
    """One line about a setting that is `before` in one place, and `now` in another."""
    values = f'{name} is {before} {there}, and {now} {here}'
    if len(values) <= 200:
        return values
    if not isinstance(before, str) or not isinstance(now, str):
        return f'{name} differs'
    lines = itertools.zip_longest(before.splitlines(), now.splitlines(), fillvalue='')
    for number, (old, new) in enumerate(lines, 1):
        if old != new:
            values = f'"{old.strip()[:60]}" {there}, and "{new.strip()[:60]}" {here}'
            return f'line {number} of {name} is {values}'
    return f'{name} differs'


def first_difference(before, now, there='there', here='here'):
    """What differs between two configs, in one line, or None. The data may have another path."""
    before, now = flat(before), flat(json.loads(json.dumps(now)))
    for name in sorted(before.keys() | now.keys()):
        if name != 'data.path' and before.get(name) != now.get(name):
            return describe_difference(name, before.get(name), now.get(name), there, here)
    return None


def open_log(folder, config):
    """Make `folder` the log for `config`, or check that it is. Many processes may do so at once.

    Raises UserError if it is the log of something else.
    """
    file = folder / 'config.json'
    if folder.exists() and not folder.is_dir():
        raise UserError(f'--out {folder}: is not a folder')
    folder.mkdir(parents=True, exist_ok=True)
    harmless = ('.lock', '.tmp', '.out', '.err', '.log')  # for example a scheduler's
    others = [path.name for path in folder.iterdir() if path.suffix not in harmless]
    if others and not file.exists():
        raise UserError(f'--out {folder}: holds {others[0]}, and no log; choose another folder')
    try:
        with locked(folder / 'config.lock', PATIENCE):
            if not file.exists():
                write_json(file, config)
    except Timeout as error:
        raise UserError(is_busy(folder / 'config.lock')) from error
    (folder / 'runs').mkdir(exist_ok=True)
    (folder / 'locks').mkdir(exist_ok=True)
    try:
        difference = first_difference(read_json(file), config)
    except ValueError as error:
        raise UserError(f'{file}: {error}; choose another folder') from error
    if difference:
        raise UserError(f'--out {folder}: {difference}; choose another folder')


#### Records #######################################################################################


def is_record(content):
    """Whether a file's content has what the summary needs of a run."""
    if not isinstance(content, dict) or type(content.get('seed')) is not int:
        return False
    numbers = [content.get('seconds'), content.get('pflop') or 0]
    if not content.get('failed'):
        numbers.append(content.get('tta_val_acc'))
    return all(type(number) in (int, float) and 0 <= number < math.inf for number in numbers)


def run_file(folder, run):
    return folder / 'runs' / f'{run:05}.json'


def lock_file(folder, run):
    return folder / 'locks' / f'{run:05}.lock'


def read_record(file, seed):
    """The record in a file of the folder `runs`. `seed` is that of run 0.

    Raises ValueError, in a few words, if it is not the whole record of its run.
    """
    record = read_json(file)
    if not is_record(record):
        raise ValueError('is not the whole record of a run')
    if file.stem != f'{record["seed"] - seed:05}':
        raise ValueError(f'has the seed of another run, {record["seed"]}')
    return record


def read_records(folder, seed):
    """{run: record} of the finished runs. `seed` is that of run 0.

    A file that is not the whole record of its run is renamed, with a message, and so its run will
    be made again.
    """
    records = {}
    for file in sorted((folder / 'runs').glob('*.json')):
        try:
            record = read_record(file, seed)
            records[record['seed'] - seed] = record
        except FileNotFoundError:  # another process just renamed it
            continue
        except ValueError as error:
            print(f'{file}: {error}; now {file.stem}.damaged', flush=True)
            with suppress(FileNotFoundError):
                file.rename(file.with_suffix('.damaged'))
    return records


def count_missing(records, wanted):
    return wanted - sum(run < wanted for run in records)


#### Sharing runs ##################################################################################


def make_runs(folder, wanted, make_run):
    """Call make_run(run) for each run that is missing and that no other process is making."""
    has_made_one = True
    while has_made_one:  # again, because another process may have been killed in the meantime
        has_made_one = False
        for run in range(wanted):
            if run_file(folder, run).exists():
                continue
            try:
                with locked(lock_file(folder, run)):
                    if not run_file(folder, run).exists():
                        make_run(run)
                        has_made_one = True
            except Timeout:
                continue


#### Runs that all ranks make together #############################################################


def gather(value):
    """A list of what each rank called this with."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def stop_together(mistake):
    """Stop all ranks if any has a mistake: a line, or None. Rank 0 raises it as UserError."""
    for line in gather(mistake):
        if line is not None:
            raise UserError(line) if is_first_process() else SystemExit(2)


def check_agreement(folder, config):
    """Stop all ranks unless they have the same settings, data and folder."""
    first, *others = gather({'--out': str(folder)} | config)
    for rank, other in enumerate(others, 1):
        difference = first_difference(other, first, f'on rank {rank}', 'on rank 0')
        if difference:
            stop_together(f'the ranks must agree: {difference}')


@contextmanager
def open_log_together(folder, config):
    """Open the log on rank 0, and keep other commands out of it. All ranks must see the folder."""
    check_agreement(folder, config)
    line = None
    with ExitStack() as stack:
        if is_first_process():
            try:
                open_log(folder, config)
                stack.enter_context(locked(folder / 'call.lock'))
            except Timeout:
                line = is_busy(folder / 'call.lock')
            except (UserError, OSError) as error:
                line = first_lines(error)
        stop_together(line)
        sees_log = (folder / 'config.json').exists()
        stop_together(None if sees_log else f'--out {folder}: not all ranks see this folder')
        yield


def make_runs_together(folder, seed, wanted, make_run):
    """Call make_run(run) on all ranks for each run that is missing."""
    records = read_records(folder, seed) if is_first_process() else {}
    made = gather(list(records))[0]
    for run in range(wanted):
        if run not in made:
            make_run(run)
