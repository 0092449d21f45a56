# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""The state of a run in a file, and what a resumed run continues from."""
import hashlib
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Union

import torch
from mmengine.dist import all_gather_object, get_world_size
from mmengine.logging import print_log
from torch import Tensor

from .checkpoint import ensure_writable_dir, load_checkpoint_file, save_torch
from .errors import UserError
from .evolution import Evolver
from .processes import stopping_together
from .recipe import Recipe
from .student import Reconstructor, TensorGroup
from .synthesis import Synthesizer


class SavedRun:
    """Saves and restores images, game and blocks, step by step.

    The file holds images, optimizers, random generators, what the student has learned,
    steps, losses and seconds: a resumed run ends with the same bits on the CPU.

    Args:
        path (str or Path): The file; each of several processes has its own.
        resume (bool): Whether to continue from it.
        recipe (Recipe): What the run does.
        seed (int): Seed of the run.
        identity (Mapping): What else two runs must have in common, by name.
    """

    def __init__(self, path: Union[str, Path], resume: bool, recipe: Recipe, seed: int,
                 identity: Mapping[str, Any]) -> None:
        self.path, self.resume = Path(path), resume
        if self.path.is_dir():
            raise UserError(f'state_file {path} is a folder; expected a file in it')
        ensure_writable_dir(self.path.parent)
        sections = {name: _comparable(section) for name, section in recipe.to_dict().items()}
        self._of_images = dict({'number of processes': get_world_size()}, seed=seed, **identity,
                               synthesis=sections.pop('synthesis'))
        self._of_sensitivity = dict(quantization=sections['quantization'])
        self._of_blocks = sections
        self._of_game = {k: v for k, v in sections.items() if k != 'reconstruction'}
        self._state: Dict[str, Any] = {}  # of all phases so far, saved again with the next

    @property
    def extra_of_images(self) -> Dict[str, Any]:
        """dict: What hooks kept when images were saved last; empty if there is nothing."""
        found: Dict[str, Any] = self._state.get('extra_of_images', {})
        return found

    def save_images(self, images: Synthesizer, seconds: Mapping[str, float],
                    extra: Mapping[str, Any]) -> None:
        """Save the images in the making, and with them what hooks keep."""
        self._save(seconds, images=images.state_dict(), extra_of_images=dict(extra))

    def save_sensitivity(self, groups: Sequence[TensorGroup],
                         seconds: Mapping[str, float]) -> None:
        """Save what bits are chosen by."""
        self._save(seconds, sensitivity=[asdict(group) for group in groups],
                   fingerprint_of_sensitivity=self._of_sensitivity)

    def save_game(self, game: Evolver, seconds: Mapping[str, float],
                  extra: Mapping[str, Any]) -> None:
        """Save the game, and with it what hooks keep."""
        self._save(seconds, game=game.state_dict(), fingerprint_of_game=self._of_game,
                   extra=dict(extra))

    def save_blocks(self, blocks: Reconstructor, seconds: Mapping[str, float]) -> None:
        """Save the blocks that have learned."""
        self._save(seconds, blocks=blocks.state_dict(), fingerprint_of_blocks=self._of_blocks)

    def _save(self, seconds: Mapping[str, float], **state: Any) -> None:
        self._state.update(state)
        save_torch({'images': {}, **self._state, 'fingerprint': self._of_images,
                    'seconds': dict(seconds)}, self.path)

    def restore_images(self, images: Optional[Synthesizer] = None) -> Dict[str, float]:
        """Continue the synthesis.

        Args:
            images (Synthesizer, optional): A fresh one. Defaults to None: images are given,
                and there is only a game to continue.

        Returns:
            dict[str, float]: Seconds of each phase so far.

        Raises:
            UserError: If the file is damaged, or of another run: what differs is named.
        """
        if not self.resume:
            return {}
        with stopping_together():
            state = self._read() if self.path.exists() else None
        if state is None:
            print_log(f'nothing to resume: there is no {self.path}; starting from the first step',
                      logger='current', level=logging.WARNING)
            return {}
        self._state = {k: state[k] for k in ('images', 'extra_of_images') if k in state}
        if images is not None:
            images.load_state_dict(state['images'])
            print_log(f'resumed {self.path} at step {images.step_index} of '
                      f'{images.total_steps}', logger='current')
        seconds = dict(state['seconds'])
        for key, phase, own in (('sensitivity', 'allocation', self._of_sensitivity),
                                ('game', 'evolution', self._of_game),
                                ('blocks', 'reconstruction', self._of_blocks)):
            others = _differing(state[f'fingerprint_of_{key}'], own) if key in state else []
            if others:
                print_log(f'{self.path} is of a run with another {", ".join(others)}: its images '
                          f'are used, the {phase} starts again', logger='current',
                          level=logging.WARNING)
                seconds.pop(phase, None)
            else:
                self._state.update({k: v for k, v in state.items() if k in (
                    key, f'fingerprint_of_{key}', 'extra' if key == 'game' else key)})
        return seconds

    def restore_sensitivity(self) -> Optional[List[TensorGroup]]:
        """What bits are chosen by, if all processes have it: on a GPU it would not be the same
        if it was measured again, and what was saved later is of these bits."""
        saved = self._state.get('sensitivity')
        if not all(all_gather_object(saved is not None)):
            self._state.pop('sensitivity', None)
            return None
        return [TensorGroup(tuple(map(tuple, group['tensors'])), group['elements'],
                            group['losses']) for group in saved or ()]

    def restore_game(self, game: Evolver) -> Optional[Dict[str, Any]]:
        """Continue the game.

        Args:
            game (Evolver): A fresh one.

        Returns:
            dict, optional: What hooks kept; None if the game starts anew.
        """
        if not self._restore(game, 'game', 'evolution'):
            self._state.pop('blocks', None)  # they would have learned from another student
            return None
        return self._state['extra']

    def restore_blocks(self, blocks: Reconstructor) -> None:
        """Continue with the next block.

        Args:
            blocks (Reconstructor): A fresh one.
        """
        self._restore(blocks, 'blocks', 'reconstruction')

    def _restore(self, fresh: Union[Evolver, Reconstructor], key: str, phase: str) -> bool:
        """Continue a phase, if all processes were saved at the same step of it."""
        state = self._state.get(key)
        # The processes save each for itself; one that was stopped earlier, or whose file is
        # missing, would go on with another student than the rest.
        steps = all_gather_object(state['step_index'] if state else 0)
        if len(set(steps)) > 1:
            print_log('the saved states of the processes are of different steps of the '
                      f'{phase} ({", ".join(map(str, steps))}): it starts again',
                      logger='current', level=logging.WARNING)
            self._state.pop(key, None)
        if not state or len(set(steps)) > 1:
            return False
        fresh.load_state_dict(state)
        print_log(f'resumed the {phase} at step {fresh.step_index} of {fresh.total_steps}',
                  logger='current')
        return True

    def _read(self) -> Dict[str, Any]:
        state = load_checkpoint_file(str(self.path))
        if not isinstance(state, dict) or not {'fingerprint', 'images', 'seconds'} <= {*state}:
            raise UserError(f'{self.path} is not the state of a quantization run; remove it, or '
                            'start anew (without resume)')
        others = _differing(state['fingerprint'], self._of_images)
        if others:
            raise UserError(f'cannot resume: {self.path} was written by a run with another '
                            f'{", ".join(others)}; use the same, or start anew (without resume)')
        return state


def hash_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names and values of tensors, in hexadecimal digits."""
    digest = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        digest.update(f'{name} {value.dtype} {tuple(value.shape)}'.encode())
        if value.numel():
            flat = value.detach().cpu().contiguous().view(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _comparable(section: Mapping[str, Any]) -> Dict[str, Any]:
    """A section without what no saved step depends on: weights are rounded anew."""
    return {key: _comparable(value) if isinstance(value, Mapping) else value
            for key, value in section.items() if key not in ('save_interval', 'rounding')}


def _differing(saved: Mapping[str, Any], own: Mapping[str, Any]) -> List[str]:
    """Names of what a run has not in common with that of a saved state."""
    return [name for name, value in own.items() if saved.get(name) != value]
