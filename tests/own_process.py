# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Scripts in processes of their own, without the seconds that their imports take.

A server of processes imports what all of them need, once, before anything of a
test has run; each process is a fork of it.
"""
import multiprocessing
import os
import runpy
import sys
from subprocess import CompletedProcess
from typing import Mapping, Sequence

SERVER = multiprocessing.get_context('forkserver')
SERVER.set_forkserver_preload([
    'psaq_mm.engine', 'psaq_mm.engine.inference', 'mmdet.apis', 'mmseg.apis', 'mmdet.models', 'mmdet.datasets',
    'mmseg.models', 'mmseg.datasets'])


def _run(arguments: Sequence[str], output: str, folder: str, env: Mapping[str, str]) -> None:
    with open(output, 'wb') as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.update(env)
    os.chdir(folder)
    sys.argv = list(arguments)
    sys.path.insert(0, os.path.dirname(arguments[0]))
    runpy.run_path(arguments[0], run_name='__main__')


def run_scripts(folder, *arguments, environments=({}, )):
    """Run a Python script in a process for each environment, all at once.

    Args:
        folder (Path): The processes' working directory; their output goes to files there.
        *arguments: The script and what stands behind it on the command line.
        environments (sequence of dict): Variables that each of the processes has, besides
            those of this one.

    Returns:
        list[CompletedProcess]: Of each its status, and as ``stdout`` all that it said.
    """
    words = [str(argument) for argument in arguments]
    files = [folder / f'output_{i}.txt' for i in range(len(environments))]
    processes = [SERVER.Process(target=_run, args=(words, str(file), str(folder), dict(env)))
                 for file, env in zip(files, environments)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(300)
    finally:
        for process in processes:
            process.kill()
    return [CompletedProcess(words, process.exitcode, file.read_text())
            for process, file in zip(processes, files)]
