# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The runner of a quantization: mmengine's, around our pipeline."""
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union, cast

import torch
from mmengine.config import Config
from mmengine.dist import get_rank, is_distributed, is_main_process
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper, revert_sync_batchnorm
from mmengine.runner import Runner
from mmengine.runner.checkpoint import _load_checkpoint_to_model
from PIL import Image
from torch import Tensor, nn

from psaq_mm.adapters import find_adapter
from psaq_mm.adapters.tested_size import SizeFound, tested_size
from psaq_mm.checkpoint import (
    WeightChoice,
    fit_float_state,
    is_quantized,
    load_checkpoint_file,
    meta_of,
    read_manifest,
    save,
)
from psaq_mm.errors import UserError
from psaq_mm.pipeline import Pipeline
from psaq_mm.processes import stopping_together
from psaq_mm.recipe.merging import plain_copy
from psaq_mm.registry import RUNNERS
from psaq_mm.student import scope_of

from .config import custom_hooks, hook_class, read_recipe
from .hooks import PSAQHook


class RunnerPipeline(Pipeline):
    """A pipeline whose points are those of the hooks of a runner."""

    def __init__(self, runner: 'PSAQRunner', **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.runner = runner

    def notify(self, point: str, **arguments: Any) -> None:
        self.runner.call_hook(point, **arguments)

    def extra_state(self) -> Dict[str, Any]:
        return {**super().extra_state(), **{name: [hook.state_dict() for hook in hooks]
                                            for name, hooks in self._hooks().items()}}

    def load_extra_state(self, state: Dict[str, Any]) -> None:
        super().load_extra_state(state)
        for name, hooks in self._hooks().items():
            for hook, saved in zip(hooks, state.get(name, [])):
                hook.load_state_dict(saved)

    def _hooks(self) -> Dict[str, List[PSAQHook]]:
        """Our hooks, by the name of their class."""
        found: Dict[str, List[PSAQHook]] = {}
        for hook in self.runner.hooks:
            if isinstance(hook, PSAQHook):
                found.setdefault(type(hook).__name__, []).append(hook)
        return found


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
            is then not wrapped for distributed training, as the steps
            exchange what they need themselves. Defaults to False.
        **kwargs: As of :class:`mmengine.runner.Runner`.
    """

    model: nn.Module

    pipeline: RunnerPipeline
    """The quantization: its models, images, settings and seconds; from :meth:`quantize` on."""

    pictures: List[Tuple[Image.Image, str]]
    """Pictures of synthetic images for the report, and the sentence under each."""

    bits_picture: Optional[Image.Image]
    """The bits that were chosen for a budget, for the report."""

    default_psaq_hooks = ('ProgressHook', 'ContactSheetHook', 'BitsHook', 'ReportHook')
    """Hooks of :meth:`for_quantization`, besides those of the config."""

    def __init__(self, *args: Any, device: Union[str, torch.device, None] = None,
                 trust_checkpoint: bool = False, quantizing: bool = False,
                 **kwargs: Any) -> None:
        self.quantizing = quantizing
        cfg = kwargs.get('cfg') or {}  # from_cfg passes on mmengine's own keys only
        device = device or cfg.get('device')
        self.device = None if device is None else torch.device(device)
        self.trust_checkpoint = trust_checkpoint or bool(cfg.get('trust_checkpoint'))
        self.weight_choice = WeightChoice(**(cfg.get('weight_choice') or {}))
        super().__init__(*args, **kwargs)

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
        if is_quantized(checkpoint):  # the hook checks it
            self.weight_choice.refuse(filename)
        else:
            checkpoint = dict(meta=meta_of(checkpoint), state_dict=fit_float_state(
                model, checkpoint, filename, self.weight_choice))
        self.call_hook('after_load_checkpoint', checkpoint=checkpoint)
        _load_checkpoint_to_model(model, checkpoint, strict, revise_keys=list(revise_keys))
        self._has_loaded = True
        return checkpoint

    def test(self) -> Dict[str, float]:
        """As mmengine's.

        Raises:
            UserError: If a file of the test set is not there.
        """
        try:
            return super().test()
        except FileNotFoundError as error:
            raise UserError('the test set or its evaluator needs a file that is not there: '
                            f'{error.filename or str(error).splitlines()[-1]}') from error

    @classmethod
    def hooks_for_quantization(cls, config: Config) -> List[Any]:
        """Our hooks, and those of ``custom_hooks`` that are a :class:`PSAQHook`.

        Raises:
            UserError: If ``custom_hooks`` is no list of hooks, or names one that is not
                registered.
        """
        hooks: List[Any] = [dict(type=f'psaq_mm.{name}') for name in cls.default_psaq_hooks]
        for hook in custom_hooks(config):
            kind = hook_class(hook, config.get('default_scope') or 'mmdet')
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
                         device: Union[str, torch.device] = 'cpu', launcher: str = 'none',
                         images: Optional[Tensor] = None, mix: bool = False,
                         shown_images: Sequence[Path] = (), sensitivity_images: int = 1,
                         command: Optional[str] = None) -> 'PSAQRunner':
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
                (``pytorch``, ``slurm`` or ``mpi``) gives each process its own.
            images (Tensor, optional): From :func:`psaq_mm.load_images`; the last ranges are
                set at their size. Defaults to None: images are made.
            mix (bool): Whether images are made too. Defaults to False.
            shown_images (Sequence[Path]): Image files; the report shows what the float and the
                quantized model predict on them. Defaults to none.
            sensitivity_images (int): As of :class:`~psaq_mm.engine.hooks.ReportHook`. Defaults
                to 1.
            command (str, optional): How the run was started, for the report. Defaults to None.
        """
        hooks = cls.hooks_for_quantization(config)
        for hook in hooks:
            if hook == dict(type='psaq_mm.ReportHook'):
                hook['sensitivity_images'] = sensitivity_images
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
        runner.own_images, runner.mix = images, mix
        runner.shown_images, runner.command = list(shown_images), command
        runner.pictures, runner.bits_picture = [], None
        return runner

    def dump_config(self) -> None:
        """Write the config to the work directory, as mmengine does, but never
        over the file that it was read from."""
        source = self.cfg.filename
        target = Path(self.work_dir) / Path(source or '').name
        if source is None or not target.exists() or not target.samefile(source):
            super().dump_config()

    @property
    def images(self) -> Tensor:
        """Tensor: What the student is made on, normalized, shape (N, C, H, W)."""
        return self.pipeline.images

    @property
    def images_used(self) -> Dict[str, Any]:
        """dict: What report and manifest say of :attr:`images`: ``count``, ``shape`` (C, H, W),
        and how many are ``own`` and ``synthetic``."""
        return dict(count=len(self.images), shape=list(self.images.shape[1:]),
                    **self.pipeline.sources)

    @property
    def teacher(self) -> nn.Module:
        """nn.Module: The float model."""
        return self.pipeline.teacher

    def forward_student(self, images: Tensor) -> None:
        """Run the quantized part of the student on images."""
        student = self.pipeline.student
        self.adapter.forward(student, images.to(self.device), scope_of(student, self.adapter))

    def quantize(self) -> nn.Module:
        """Run the pipeline, with our hooks, and write ``<work-dir>/quantized.pth``.

        Returns:
            nn.Module: The student.
        """
        self.adapter = find_adapter(self.model)
        rank = get_rank()
        name = f'state_{rank}.pth' if rank else 'state.pth'
        size = tested_size(self.cfg)
        if self.own_images is not None:
            size = SizeFound((self.own_images.shape[-2], self.own_images.shape[-1]),
                             'the given images')
        self.pipeline = RunnerPipeline(
            self, teacher=self.model, recipe=read_recipe(self.cfg), seed=self.run_seed,
            test_size=size, images=self.own_images, mix=self.mix, meta=self.source_meta,
            state_file=Path(self.work_dir) / name, resume=self.resume_run,
            identity=dict(checkpoint=self.source['sha256'],
                          model=repr(plain_copy(self.cfg.model.to_dict()))))
        self.model = self.pipeline.run()
        with stopping_together():
            if is_main_process():
                path = Path(self.work_dir) / 'quantized.pth'
                save(self.model, path, meta=self.source_meta,
                     about=dict(seed=self.run_seed, source=self.source, images=self.images_used,
                                settings=self.pipeline.recipe.to_dict()))
                self.logger.info(f'quantized checkpoint: {path}')
                self.call_hook('after_quantize')
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
