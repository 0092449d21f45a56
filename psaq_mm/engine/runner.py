# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The runner of a quantization: mmengine's, with phases of our own."""
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple, Union, cast

import torch
from mmengine.config import Config
from mmengine.dist import barrier, is_distributed, is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper, revert_sync_batchnorm
from mmengine.runner import Runner
from mmengine.runner.checkpoint import _load_checkpoint_to_model
from torch import Tensor, nn

from psaq_mm import api
from psaq_mm.adapters import find_adapter
from psaq_mm.checkpoint import (
    fit_float_state,
    is_quantized,
    load_checkpoint_file,
    read_manifest,
)
from psaq_mm.errors import UserError
from psaq_mm.registry import HOOKS, LOOPS, RUNNERS

from .config import SECTIONS, Sections, custom_hooks, read_sections
from .hooks import PSAQHook
from psaq_mm.adapters.tested_size import tested_size


@RUNNERS.register_module()
class PSAQRunner(Runner):
    """Quantizes a model without data, and tests float or quantized models.

    Beside mmengine's: :meth:`quantize`; checkpoints are read without running
    code, and the model goes to a chosen device.

    Args:
        *args: As of :class:`mmengine.runner.Runner`.
        device (torch.device or str, optional): Where the model runs; None for
            the config's ``device``, or what mmengine finds. Defaults to None.
        trust_checkpoint (bool): Whether checkpoints may run code when they
            are read; the config's ``trust_checkpoint`` does the same.
            Defaults to False.
        quantizing (bool): Whether :meth:`quantize` will be called: the model
            is then not wrapped for distributed training, as the phases
            exchange what they need themselves. Defaults to False.
        **kwargs: As of :class:`mmengine.runner.Runner`.
    """

    model: nn.Module

    phases = ('SynthesisLoop', 'CalibrationLoop', 'EvolutionLoop', 'FinalRangesLoop',
              'RoundingLoop')
    """Names in the LOOPS registry, in the order of :meth:`quantize`."""

    default_psaq_hooks = ('ResumeHook', 'ProgressHook', 'ContactSheetHook', 'ReportHook')
    """Hooks of :meth:`for_quantization`, besides those of the config."""

    def __init__(self, *args: Any, device: Union[str, torch.device, None] = None,
                 trust_checkpoint: bool = False, quantizing: bool = False,
                 **kwargs: Any) -> None:
        self.quantizing = quantizing
        cfg = kwargs.get('cfg') or {}  # from_cfg passes on mmengine's own keys only
        device = device or cfg.get('device')
        self.device = None if device is None else torch.device(device)
        self.trust_checkpoint = trust_checkpoint or bool(cfg.get('trust_checkpoint'))
        super().__init__(*args, **kwargs)
        self.images = torch.empty(0)
        """Tensor: The synthesized images, normalized."""
        self.seconds: Dict[str, float] = {}
        """dict[str, float]: Wall seconds of each phase."""
        self._running: Dict[str, float] = {}

    def setup_env(self, env_cfg: Dict[str, Any]) -> None:
        """As mmengine, but ``--launcher pytorch`` works without a GPU too, where
        mmengine insists on one: the processes then talk by gloo."""
        if self.launcher == 'pytorch' and not torch.cuda.is_available() and not is_distributed():
            torch.distributed.init_process_group('gloo')
        super().setup_env(env_cfg)

    def wrap_model(self, model_wrapper_cfg: Optional[dict], model: nn.Module) -> nn.Module:
        """Move the model to the device of ``--device``, or do as mmengine.

        Without a process group SyncBN becomes BN.
        """
        if not self.distributed:
            model = revert_sync_batchnorm(model)
        if self.quantizing and self.distributed:  # each process has a device
            self.device = torch.device('cuda', torch.cuda.current_device()) \
                if torch.cuda.is_available() else torch.device('cpu')
            return revert_sync_batchnorm(model).to(self.device)
        if self.distributed and not torch.cuda.is_available():
            # mmengine would name a GPU to it.
            model_wrapper_cfg = dict(
                model_wrapper_cfg or dict(broadcast_buffers=False), device_ids=None)
        if self.device is None or self.distributed:
            return super().wrap_model(model_wrapper_cfg, model)
        return model.to(self.device)

    def load_checkpoint(self, filename: str, map_location: Any = 'cpu', strict: bool = False,
                        revise_keys: Any = ((r'^module.', ''), )) -> Dict[str, Any]:
        """Load a checkpoint as mmengine does, but without running code in it,
        and strictly.

        Raises:
            UserError: If the file cannot be read or is of another model.
        """
        checkpoint = load_checkpoint_file(filename, trust=self.trust_checkpoint)
        model = self.model
        if is_model_wrapper(model):
            model = cast(nn.Module, model.module)
        if not is_quantized(checkpoint):  # the hook checks those that are
            meta = checkpoint.get('meta') if isinstance(checkpoint, Mapping) else None
            checkpoint = dict(meta=meta or {},
                              state_dict=fit_float_state(model, checkpoint, filename))
        self.call_hook('after_load_checkpoint', checkpoint=checkpoint)
        _load_checkpoint_to_model(model, checkpoint, strict, revise_keys=list(revise_keys))
        self._has_loaded = True
        return checkpoint

    @classmethod
    def hooks_for_quantization(cls, config: Config) -> List[Any]:
        """Our hooks, and those of ``custom_hooks`` that are a :class:`PSAQHook`.

        Raises:
            UserError: If ``custom_hooks`` is no list of hooks, or names one that is not
                registered.
        """
        hooks: List[Any] = [dict(type=f'psaq_mm.{name}') for name in cls.default_psaq_hooks]
        for hook in custom_hooks(config):
            kind = hook['type'] if isinstance(hook, Mapping) else type(hook)
            if isinstance(kind, str):
                kind = HOOKS.get(kind)
            if kind is None:
                raise UserError(f'custom_hooks: {hook.get("type")!r} is not registered; import '
                                'its file by custom_imports')
            if isinstance(kind, type) and issubclass(kind, PSAQHook):
                # The class: by its name it might be looked for in another scope only.
                hooks.append({**hook, 'type': kind} if isinstance(hook, Mapping) else hook)
        return hooks

    @classmethod
    def for_quantization(cls, config: Config, model: nn.Module, *, source: Mapping[str, Any],
                         meta: Mapping[str, Any], seed: int = 0, resume: bool = False,
                         device: Union[str, torch.device] = 'cpu',
                         launcher: str = 'none') -> 'PSAQRunner':
        """A runner that is ready for :meth:`quantize`.

        Args:
            config (Config): With checked sections and a ``work_dir``; its
                datasets are not opened.
            model (nn.Module): The float model with its weights.
            source (Mapping): ``file`` and ``sha256`` of the checkpoint.
            meta (Mapping): The checkpoint's ``meta``.
            seed (int): Seed of all randomness. Defaults to 0.
            resume (bool): Whether to go on from the last saved state.
                Defaults to False.
            device (str or torch.device): Defaults to ``cpu``; a launcher
                gives each process its own.
            launcher (str): ``none``, ``pytorch``, ``slurm`` or ``mpi``.
                Defaults to ``none``.

        Returns:
            PSAQRunner: The runner.
        """
        hooks = cls.hooks_for_quantization(config)
        # mmengine's default hooks count iterations of a data loader; there is
        # none here.
        no_hooks: Dict[str, Optional[Hook]] = dict.fromkeys(
            ('runtime_info', 'timer', 'sampler_seed', 'logger', 'param_scheduler',
             'checkpoint'))
        runner = cls(
            model=model, work_dir=config.work_dir, default_hooks=no_hooks, custom_hooks=hooks,
            default_scope=config.get('default_scope') or 'mmdet',
            log_level=config.get('log_level', 'INFO'), visualizer=config.get('visualizer'),
            randomness=dict(seed=seed), experiment_name=config.get('experiment_name'),
            cfg=config, device=torch.device(device), launcher=launcher, quantizing=True,
            env_cfg=dict(dist_cfg=dict(backend='nccl')))
        runner.run_seed = seed
        runner.resume_run = resume
        runner.source = dict(source)
        runner.source_meta = dict(meta)
        return runner

    def dump_config(self) -> None:
        """Write the config to the work directory, as mmengine does, but never
        over the file that it was read from."""
        source = self.cfg.filename
        target = Path(self.work_dir) / Path(source or '').name
        if source is None or not target.exists() or not target.samefile(source):
            super().dump_config()

    @property
    def settings(self) -> Dict[str, Dict[str, Any]]:
        """dict: Our sections of the config, as plain dicts."""
        values = self.cfg.to_dict()
        return {name: _without_scope(values.get(name) or {}) for name in SECTIONS}

    @property
    def sections(self) -> Sections:
        """Sections: The same, checked and with their defaults."""
        return read_sections(self.cfg)

    @property
    def final_size(self) -> Tuple[int, int]:
        """tuple[int, int]: Height and width that the student is finished at:
        ``calibration.image_size``, or that of the images themselves."""
        calibration = self.sections.calibration
        size = tested_size(self.cfg).size if calibration.image_size == 'test' \
            else calibration.size
        return size or (self.images.shape[-2], self.images.shape[-1])

    @property
    def fingerprint(self) -> Dict[str, Any]:
        """dict: What a resumed run must have in common with the first, as long
        as images are made."""
        return dict({'number of processes': self.world_size}, seed=self.run_seed,
                    checkpoint=self.source['sha256'],
                    model=_flat_text(_without_scope(self.cfg.model.to_dict())),
                    synthesis=_flat_text(self.settings['synthesis']))

    @property
    def evolution_fingerprint(self) -> Dict[str, Any]:
        """dict: The same, as soon as the student evolves. How weights are rounded is
        not in it: that is the last phase, and is done anew."""
        return {**self.fingerprint, **{name: _flat_text(self.settings[name]) for name in
                                       ('quantization', 'calibration', 'evolution')}}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the wall time of a block to ``seconds[name]``."""
        self._running[name] = time.perf_counter()
        try:
            yield
        finally:
            self.seconds = self.seconds_so_far()
            del self._running[name]

    def seconds_so_far(self) -> Dict[str, float]:
        """dict[str, float]: ``seconds``, running phases included."""
        now = time.perf_counter()
        total = dict(self.seconds)
        for name, start in self._running.items():
            total[name] = total.get(name, 0.) + now - start
        return total

    def forward_student(self, images: Tensor) -> None:
        """Run the quantized part of the student on images."""
        self.adapter.forward(self.model, images.to(self.device),
                             api.scope_of(self.model, self.adapter))

    def quantize(self) -> nn.Module:
        """Run all phases and write ``<work-dir>/quantized.pth``.

        Returns:
            nn.Module: The student, quantized and switched on.
        """
        self.adapter = find_adapter(self.model)
        self.teacher = self.model  # stays float; the student will be a copy of it
        for name in self.phases:
            LOOPS.build(dict(type=f'psaq_mm.{name}', runner=self)).run()
        if is_main_process():
            path = Path(self.work_dir) / 'quantized.pth'
            api.save(self.model, path, meta=self.source_meta, seed=self.run_seed,
                     source=self.source, settings=self.settings)
            self.logger.info(f'quantized checkpoint: {path}')
            self.call_hook('after_quantize')
        barrier()
        return self.model


def describe_checkpoint(path: str, trust: bool = False) -> str:
    """Say in a few words what a checkpoint is: float, or quantized how."""
    checkpoint = load_checkpoint_file(path, trust=trust)
    if not is_quantized(checkpoint):
        return 'float'
    counts: Dict[str, int] = {}
    try:
        manifest = read_manifest(checkpoint)
    except UserError as error:
        raise UserError(f'{path}: {error}') from error
    for entry in manifest['modules'].values():
        weight = entry['roles'].get('weight')
        others = [s['bits'] for r, s in entry['roles'].items() if r != 'weight']
        name = (f'W{weight["bits"]}' if weight else '') \
            + (f'A{min(others)}' if others else '')
        counts[name] = counts.get(name, 0) + 1
    parts = ', '.join(f'{k} in {v} modules' for k, v in
                      sorted(counts.items(), key=lambda item: -item[1]))
    return f'quantized ({parts})'


def _without_scope(value: Any) -> Any:
    """Drop the ``_scope_`` marks that mmengine leaves in inherited dicts."""
    if isinstance(value, Mapping):
        return {k: _without_scope(v) for k, v in value.items() if k != '_scope_'}
    if isinstance(value, (list, tuple)):
        return type(value)(_without_scope(v) for v in value)
    return value


def _flat_text(section: Dict[str, Any]) -> str:
    """A section as text that two equal ones share, without what no saved step depends on."""
    return repr(sorted((key, value) for key, value in _flat(section).items()
                       if not key.endswith(('save_interval.', '.rounding.'))))


def _flat(value: Any, prefix: str = '') -> Dict[str, str]:
    if isinstance(value, Mapping):
        return {k: v for name, part in value.items()
                for k, v in _flat(part, f'{prefix}{name}.').items()}
    return {prefix: repr(list(value) if isinstance(value, tuple) else value)}
