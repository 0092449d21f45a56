# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""Scripts in processes of their own, without the seconds that their imports take.

A server of processes imports what all of them need, once, before anything of a
test has run; each process is a fork of it.
"""
import multiprocessing
import os
import runpy
import socket
import sys
from subprocess import CompletedProcess
from typing import Mapping, Sequence

import torch.multiprocessing

SERVER = multiprocessing.get_context('forkserver')
SERVER.set_forkserver_preload(  # not psaq_mm: without any import of ours stock tools find it
    ['matplotlib.figure', 'timm', *(f'{host}.{part}' for host in ('mmdet', 'mmseg') for part in (
        'apis', 'datasets', 'engine', 'evaluation', 'models', 'visualization'))])


def _run(words: Sequence[str], output: str, folder: str, env: Mapping[str, str]) -> None:
    with open(output, 'wb') as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    os.environ.update(env)
    os.chdir(folder)
    sys.argv = list(words)
    if words[0] == '-m':
        sys.argv = sys.argv[1:]
        runpy.run_module(words[1], run_name='__main__', alter_sys=True)
    else:
        sys.path.insert(0, os.path.dirname(words[0]))
        runpy.run_path(words[0], run_name='__main__')


def run_scripts(folder, *arguments, environments=({}, )):
    """Run a Python script in a process for each environment, all at once.

    Args:
        folder (Path): The processes' working directory; their output goes to files there.
        *arguments: The script, or -m and a module, and what stands behind it on the command
            line.
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


def of_two():
    """The variables that a launcher gives to each of two processes on a CPU."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    return [dict(CUDA_VISIBLE_DEVICES='', RANK=rank, LOCAL_RANK=rank, WORLD_SIZE='2',
                 MASTER_ADDR='127.0.0.1', MASTER_PORT=port) for rank in '01']


def start_two(function, folder):
    """Call a function of the rank, the number of processes and a folder in two of them."""
    torch.multiprocessing.start_processes(function, (2, str(folder)), 2,
                                          start_method='forkserver')
