# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The shell around the tools: clear errors and exit statuses."""
import argparse
import os
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, List, Mapping, Optional, Tuple

import torch
from mmengine.config import Config, DictAction
from mmengine.dist import is_distributed
from mmengine.hooks import EMAHook, Hook
from mmengine.utils import is_method_overridden

from psaq_mm.adapters.tested_size import test_datasets
from psaq_mm.checkpoint import WeightChoice, sha256_of_file
from psaq_mm.errors import UserError
from psaq_mm.recipe.checks import check_seed
from psaq_mm.registry import DATASETS

from .config import custom_hooks, hook_class

CHECKPOINT_HOOK = 'psaq_mm.QuantizedCheckpointHook'

WORLD_SIZES = dict(pytorch='WORLD_SIZE', slurm='SLURM_NTASKS', mpi='OMPI_COMM_WORLD_SIZE')
"""Launcher to the variable by which it says how many processes there are."""


class ConfigOptions(DictAction):
    """mmengine's ``--cfg-options``, with a usage error for what is no KEY=VALUE."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        try:
            super().__call__(parser, *args, **kwargs)
        except (ValueError, AssertionError) as error:
            parser.error(f'--cfg-options takes KEY=VALUE pairs ({error})')


def tool_parser(description: str, config: str, checkpoint: str) -> argparse.ArgumentParser:
    """A parser of what all tools take, by help on the tool and its first two arguments."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument('config', help=config)
    parser.add_argument('checkpoint', help=checkpoint)
    parser.add_argument('--work-dir', help='where to write '
                        '(default: work_dirs/<name of the config>)')
    parser.add_argument('--cfg-options', nargs='+', action=ConfigOptions, metavar='KEY=VALUE',
                        help='override config keys, e.g. quantization.weight.bits=4 '
                        'synthesis.num_images=16')
    which = parser.add_mutually_exclusive_group()
    which.add_argument('--ema', action='store_const', const=True, dest='averaged',
                       help='take the averaged weights of a float checkpoint (default, where '
                       'there are any)')
    which.add_argument('--raw', action='store_const', const=False, dest='averaged',
                       help='take the weights that are no averages')
    parser.add_argument('--prefix', help='what the keys of the model begin with in a float '
                        'checkpoint of several, e.g. teacher')
    parser.add_argument('--trust-checkpoint', action='store_true',
                        help='let checkpoints run code when they are read (unsafe)')
    return parser


def weight_choice(args: argparse.Namespace) -> WeightChoice:
    """Which weights of a float checkpoint the options of :func:`tool_parser` ask for."""
    return WeightChoice(args.averaged, args.prefix)


def parse_launched(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line of a tool that a launcher may start, with the options of that."""
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda or cuda:N')
    parser.add_argument('--launcher', choices=['none', *WORLD_SIZES], default='none',
                        help='job launcher, as of mmdet: several processes share the images')
    parser.add_argument('--use-vis-backends', action='store_true', help='use all visualization '
                        'backends of the config, which may send losses, results and config away')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0)
    args = parser.parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def public_command(private: Iterable[Optional[str]]) -> str:
    """The command line of this process, but for the names of somebody's images.

    Args:
        private (Iterable[str]): Arguments that are not repeated; None is passed over.
    """
    hidden = {name for name in private if name}
    program = sys.argv[0]
    words = ['python', program] if program.endswith('.py') else program.split()
    for word in sys.argv[1:]:
        option, _, value = word.partition('=')
        if word in hidden:
            word = 'IMAGES'
        elif value in hidden:
            word = f'{option}=IMAGES'
        if word != 'IMAGES' or words[-1:] != ['IMAGES']:
            words.append(word)
    return ' '.join(shlex.quote(word) for word in words)


def run_tool(main: Callable[[], Any]) -> None:
    """Run a tool's main function and exit.

    Exit status 2 and one or two lines on standard error for a
    :class:`UserError`; 1 for a loss that is not finite; 130 for Ctrl-C. Any
    other exception is a bug and keeps its traceback.
    """
    status = 0
    try:
        main()
    except UserError as error:
        print(f'error: {error}', file=sys.stderr)
        status = 2
    except FloatingPointError as error:
        print(f'error: {error}', file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print('interrupted', file=sys.stderr)
        sys.exit(130)
    if is_distributed():
        leave_group()
    if status:
        sys.exit(status)


def leave_group() -> None:
    """Take the group of processes down, with no collective on its way.

    A group that is still up as the interpreter ends can abort the process, by a thread of
    gloo that runs on, and the exit status then says that work failed which is done.
    """
    # Such a thread may still hold a tensor that is Python's: torch 2.1 would wait for ever.
    time.sleep(0.5)
    torch.distributed.destroy_process_group()


def choose_work_dir(given: Optional[str], config: Config) -> str:
    """Work directory by mmdet's rule: command line, config, config's name."""
    if given is not None:
        return given
    if config.get('work_dir'):
        return str(config.work_dir)
    return os.path.join('work_dirs', Path(config.filename).stem)


def choose_seed(given: Optional[int], config: Config) -> int:
    """Seed by mmengine's rule: command line, or ``randomness`` of the config; else 0.

    Raises:
        UserError: If it is no seed.
    """
    seed = given
    if seed is None:
        seed = (config.get('randomness') or {}).get('seed')
    if seed is None:
        return 0
    return check_seed(seed, '--seed' if given is not None else 'randomness.seed')


def require_test_data(config: Config) -> None:
    """Check that the test set of a config is there, before a model is built.

    Raises:
        UserError: If the config evaluates nothing, an annotation file or the
            image folder is missing, or a folder of classes is not one.
    """
    if config.get('test_dataloader') is None or config.get('test_evaluator') is None:
        raise UserError(f'config {config.filename} has no test_dataloader and test_evaluator: '
                        'there is nothing to evaluate on')
    for dataset in test_datasets(config):
        root = dataset.get('data_root') or ''
        for key, path in _files_of(dataset):
            full = path if key == 'root' else os.path.join(root, path)
            if '://' not in root + path and not os.path.exists(full):
                raise UserError(f'test_dataloader.dataset: {full} does not exist ({key}); put the '
                                'data there, or set test_dataloader.dataset.data_root '
                                '(classifiers: .root)')
        if dataset.get('type') == 'psaq_mm.ImageFolder':  # as quickly built as checked
            DATASETS.build(dataset)
    for evaluator in _evaluators(config.test_evaluator):
        for key, path in _files_of(evaluator):
            if '://' not in path and not os.path.exists(path):
                raise UserError(f'test_evaluator.{key}: {path} does not exist; it is of the data '
                                'of test_dataloader.dataset, set it too')


INPUT_KEYS = ('ann_file', 'data_prefix', 'root', 'label_file', 'label_map_file', 'split_file',
              'proposal_file', 'seg_prefix', 'hierarchy_file', 'image_level_ann_file', 'meta_file')
"""Keys of data sets and evaluators that name what is read; others name what is written."""


def _files_of(section: Mapping[str, Any]) -> Iterator[Tuple[str, str]]:
    """Keys and paths of what a data set or an evaluator reads."""
    if section.get('backend_args') or section.get('file_client_args'):  # they may lie elsewhere
        return
    for key in INPUT_KEYS:
        given = section.get(key)
        for path in given.values() if isinstance(given, Mapping) else \
                given if isinstance(given, (list, tuple)) else [given]:
            if isinstance(path, str) and path:
                yield key, path


def _evaluators(given: Any) -> Iterator[Mapping[str, Any]]:
    """All evaluators, those of several data sets too."""
    for one in given if isinstance(given, (list, tuple)) else [given]:
        if isinstance(one, Mapping):
            yield one
            yield from _evaluators(one.get('metrics') or [])


def require_launcher(launcher: str, device: str) -> None:
    """Check that this process was started by the launcher that is named.

    Raises:
        UserError: If not, or a device is named, which the launcher chooses, or a
            launcher started it and none is named.
    """
    if launcher == 'none':
        if os.environ.get('WORLD_SIZE', '1') != '1':
            raise UserError(f'torchrun started {os.environ["WORLD_SIZE"]} processes (WORLD_SIZE), '
                            'and each would do all the work; add --launcher pytorch')
        return
    if device != 'auto':
        raise UserError(f'--device {device}: with --launcher {launcher} each process takes its '
                        'own; leave it out')
    if launcher == 'pytorch' and 'RANK' not in os.environ:
        raise UserError('--launcher pytorch: start it by torchrun --nproc_per_node N '
                        '<the tool> ...')
    if launcher == 'pytorch' and torch.cuda.is_available() \
            and int(os.environ.get('LOCAL_RANK', 0)) >= torch.cuda.device_count():
        raise UserError(f'--launcher pytorch: more processes than the {torch.cuda.device_count()} '
                        'GPUs here; lower --nproc_per_node')
    if launcher != 'pytorch' and not torch.cuda.is_available():
        raise UserError(f'--launcher {launcher} needs GPUs, and none was found; use --launcher '
                        'pytorch')
    if WORLD_SIZES[launcher] not in os.environ:
        raise UserError(f'--launcher {launcher}: {WORLD_SIZES[launcher]} is not set, so it was '
                        'not started by that launcher')


def processes_of(launcher: str) -> int:
    """How many processes a launcher started; :func:`require_launcher` comes first."""
    return int(os.environ[WORLD_SIZES[launcher]]) if launcher != 'none' else 1


def require_backend(backend: str, exported: Optional[str], threads: int, precision: str,
                    launcher: str, device: str, engine_device: str = 'CPU') -> None:
    """Check what is asked of an engine, before a model is built.

    Raises:
        UserError: If the engine is not installed or cannot do it, or an option
            of engines is given without one.
    """
    if backend == 'torch':
        for option, given in (('--exported', exported is not None), ('--threads', threads != 0),
                              ('--precision', precision != 'fp32'),
                              ('--engine-device', engine_device != 'CPU')):
            if given:
                raise UserError(f'{option} is for engines; add --backend onnxruntime or openvino')
        return
    from psaq_mm.deploy import ENGINES, read_export
    engine = ENGINES[backend]
    engine.require_device(engine_device)  # raises where the engine is not installed
    if threads < 0:
        raise UserError(f'--threads must be 0 or more, got {threads}')
    if precision not in engine.precisions:
        raise UserError(f'--precision {precision}: {backend} on a CPU has '
                        f'{", ".join(engine.precisions)} only')
    if launcher != 'none' or device != 'cpu':
        raise UserError(f'--backend {backend} runs in one process on the CPU; leave out '
                        '--launcher and --device')
    if exported is not None:
        read_export(exported)


def hooks_for_test(config: Config, checkpoint: str, backend: str, folder: Optional[str],
                   threads: int, precision: str, engine_device: str = 'CPU') -> List[Any]:
    """The config's own hooks but those of training, and those that load a checkpoint and run
    an engine (:class:`psaq_mm.engine.hooks.BackendHook`).

    Raises:
        UserError: If ``custom_hooks`` is no list of hooks.
    """
    hooks = [hook for hook in custom_hooks(config)
             if not _only_trains(hook, config.get('default_scope') or 'mmdet')]
    if not any(isinstance(hook, dict) and hook['type'] == CHECKPOINT_HOOK for hook in hooks):
        hooks.append(dict(type=CHECKPOINT_HOOK))  # a plain config
    if backend != 'torch':
        hooks.append(dict(type='psaq_mm.BackendHook', backend=backend, folder=folder,
                          checkpoint=checkpoint, sha256=sha256_of_file(checkpoint),
                          threads=threads, precision=precision, engine_device=engine_device))
    return hooks


def _only_trains(hook: Any, scope: str) -> bool:
    """Whether a hook acts in training or validation alone, or holds averaged weights, which a
    checkpoint has in the place of the raw ones when it is saved."""
    kind = hook_class(hook, scope)
    if not isinstance(kind, type) or not issubclass(kind, Hook):
        return False  # mmengine says what is wrong
    if issubclass(kind, EMAHook):
        return True
    overridden = {name for name in dir(Hook) if is_method_overridden(name, Hook, kind)}
    training = any(re.search('train|val|save', name) for name in overridden)
    return training and not any(re.search('test|load|_epoch$|_iter$', name)
                                and not re.search('train|val', name) for name in overridden)


def prepare_for_test(config: Config) -> None:
    """Take out what only training needs: its data need not be here, and a test resumes
    nothing. One family's hook that draws segmentations would open the data."""
    for key in ('train_cfg', 'train_dataloader', 'optim_wrapper', 'param_scheduler'):
        config.pop(key, None)
    for name, hook in (config.get('default_hooks') or {}).items():
        if hook and _only_trains(hook, config.get('default_scope') or 'mmdet'):
            config.default_hooks[name] = None
    config.resume = False


def keep_local(config: Config) -> None:
    """Leave the visualizer its local files alone.

    TensorBoard, Weights & Biases and the like are told the whole config and all results, and
    may send them out of the house.
    """
    visualizer = config.get('visualizer')
    if not isinstance(visualizer, Mapping) or not visualizer.get('vis_backends'):
        return
    backends = visualizer['vis_backends']
    backends = backends if isinstance(backends, (list, tuple)) else [backends]
    kinds = [backend.get('type') if isinstance(backend, Mapping) else type(backend)
             for backend in backends]
    names = [kind.__name__ if isinstance(kind, type) else str(kind) for kind in kinds]
    dropped = [name for name in names if not name.endswith('LocalVisBackend')]
    if dropped:
        config.visualizer.vis_backends = [
            backend for backend, name in zip(backends, names) if name not in dropped]
        print(f'not used: {", ".join(dropped)} of visualizer.vis_backends, which may send results '
              'away; --use-vis-backends uses all of them')


def draw_predictions(config: Config, folder: str) -> None:
    """Let the config's own hook draw predictions, as the hosts' ``--show-dir``.

    Raises:
        UserError: If the config has no such hook.
    """
    hook: Any = (config.get('default_hooks') or {}).get('visualization')
    if not hook or 'type' not in hook or not config.get('visualizer'):
        raise UserError('--show-dir: the config has no default_hooks.visualization and visualizer '
                        'that would draw predictions')
    hook.draw = True
    if 'Seg' in str(hook.type):  # of mmseg: the visualizer knows the folder
        hook.interval = 1
        config.visualizer.save_dir = os.path.join(config.work_dir, folder)
    else:
        hook.test_out_dir = folder
