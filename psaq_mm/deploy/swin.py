# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""A Swin Transformer in the form that engines run fastest.

Modifications to what the hosts compute, none of which changes a result:

- Pad, roll and window partition are one gather, and all that in reverse is
  another. Both stand where tokens are integers already, before the layers that
  take them: a quarter of the bytes move.
- Patch merging is one gather too.
- Query, key and value are three linear layers: nothing needs to be copied apart.
- The mask of shifted windows is one of four, looked up by the kind of window.
"""
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from psaq_mm.ops import QuantOp

from .export_forms import RoundForm, quantize_input, split_linear
from .window_order import Window, merge_order, padded, shift_masks, window_order


class AttentionForm(nn.Module):
    """Window attention on slots, its bias computed beforehand.

    Args:
        attention (nn.Module): The host's window attention, or its quantized
            op, with ``qkv``, ``proj``, ``num_heads`` and ``scale``.
        bias (Tensor): Relative position bias, shape (heads, N, N).
        window (tuple[int, int]): Height and width of a window.
        shift (tuple[int, int]): Cyclic shift.
    """

    table: Tensor
    index: Tensor
    masks: Optional[Tensor]

    def __init__(self, attention: Any, bias: Tensor, window: Window, shift: Window) -> None:
        super().__init__()
        self.host = attention
        self.area = window[0] * window[1]
        self.q, self.k, self.v = split_linear(attention.qkv, 3)
        bias = self._quantize('bias_table', bias.detach())
        # Pairs of tokens that lie alike have the same bias: files hold it once, and engines
        # spread it out as they load the graph.
        table, index = torch.unique(bias.flatten(1), dim=1, return_inverse=True)
        self.register_buffer('table', table)
        self.register_buffer('index', index.int())
        self.register_buffer('masks', shift_masks(window, shift))

    def _quantize(self, role: str, x: Tensor) -> Tensor:
        return self.host.quantize(role, x) if isinstance(self.host, QuantOp) else x

    def _operand(self, role: str, x: Tensor, factor: float = 1.) -> Tuple[Tensor, float]:
        """What is multiplied for ``factor * x``, and what the product has to be
        multiplied by: a rounded operand's step goes with the other operand."""
        form = self.host.quantizers[role] if isinstance(self.host, QuantOp) \
            and role in self.host.quantizers else None
        if isinstance(form, RoundForm):
            return form.integers(x, factor), form.step
        return self._quantize(role, _times(x, factor)), 1.

    def _heads(self, x: Tensor) -> Tensor:
        """Shape (num_windows*B, heads, N, head_dim)."""
        heads = self.host.num_heads
        return x.reshape(-1, self.area, heads, x.shape[-1] // heads).permute(0, 2, 1, 3)

    def forward(self, x: Tensor, order: 'BlockPlan', batch: int) -> Tensor:
        """Args:
            x (Tensor): Tokens row by row, shape (B, L, C).
            order (BlockPlan): Where they go.
            batch (int): B.

        Returns:
            Tensor: Shape (B, L, C).
        """
        channels = x.shape[-1]
        if order.valid is None:
            # Once more behind the gather, where it changes nothing: engines look for the
            # integers beside the layer.
            x = _gather(quantize_input(self.host.qkv, x), order.enter)
        else:
            x = _gather(x, order.enter) * order.valid  # padding is zero
        x = quantize_input(self.host.qkv, x)
        # Before the heads part: engines do this in the linear layer.
        q, q_step = self._operand('query', self.q(x), float(self.host.scale))
        k, k_step = self._operand('key', self.k(x))
        v, v_step = self._operand('value', self.v(x))
        q, k = self._heads(q), self._heads(_times(k, q_step * k_step))
        bias = self.table.index_select(1, self.index)
        bias = bias.reshape(1, self.host.num_heads, self.area, self.area)
        logits = self._quantize('logits', q @ k.transpose(-2, -1)) + bias
        if self.masks is not None:
            kind = order.kind.repeat(batch) if batch > 1 else order.kind
            logits = logits + self.masks[kind].unsqueeze(1)
        attention, step = self._operand('attention', logits.softmax(dim=-1))
        v = self._heads(_times(v, v_step * step))
        out = (attention @ v).transpose(1, 2).reshape(batch, -1, channels)
        return self.host.proj(_gather(quantize_input(self.host.proj, out), order.leave))


class BlockForm(nn.Module):
    """One block. A host's subclass says what surrounds the attention."""

    attention: AttentionForm
    window: Window
    shift: Window

    def normalize(self, x: Tensor) -> Tensor:
        """Tokens (B, L, C) as they enter the attention."""
        raise NotImplementedError

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """The rest of the block: residuals and FFN."""
        raise NotImplementedError


class MergeForm(nn.Module):
    """Norm and linear layer of patch merging, on (B, L / 4, 4 * C).

    Args:
        norm (nn.Module, optional): The norm.
        reduction (nn.Module): The linear layer.
        neighbours (tuple): Offsets (down, right) of the four patches in the
            order of the channels.
    """

    def __init__(self, norm: Optional[nn.Module], reduction: nn.Module,
                 neighbours: Tuple[Window, ...]) -> None:
        super().__init__()
        self.norm, self.reduction, self.neighbours = norm, reduction, neighbours

    def forward(self, x: Tensor) -> Tensor:
        return self.reduction(x if self.norm is None else self.norm(x))


class StageForm(nn.Module):
    """Patch merging, if any, blocks, and the norm of the stage's output, if it
    has one."""

    def __init__(self, merge: Optional[MergeForm], blocks: Sequence[BlockForm],
                 output: Optional[nn.Module]) -> None:
        super().__init__()
        self.merge, self.blocks, self.output = merge, nn.ModuleList(blocks), output


class BlockPlan(NamedTuple):
    """Where tokens go in a block."""
    enter: Tensor  # row by row to windows
    valid: Optional[Tensor]  # 1 or 0 for padding; None without padding
    leave: Tensor  # windows to row by row
    kind: Tensor


class StagePlan(NamedTuple):
    """Where tokens go in a stage."""
    merge: Optional[Tensor]
    merge_valid: Optional[Tensor]
    blocks: List[BlockPlan]


class SwinForm(nn.Module):
    """The whole backbone.

    Args:
        embed (Callable): Images (B, C, H, W) to tokens (B, h*w, C) and (h, w).
        stages (Sequence[StageForm]): The stages.
        roll_first (bool): Whether the host rolls before it pads.
        size (tuple[int, int], optional): Height and width of the tokens; None
            if they vary. Defaults to None.
        batch (int): Images at once. Defaults to 1.
    """

    def __init__(self, embed: Callable[[Tensor], Tuple[Tensor, Tuple[Any, Any]]],
                 stages: Sequence[StageForm], roll_first: bool, size: Optional[Window] = None,
                 batch: int = 1) -> None:
        super().__init__()
        self.embed, self.stages, self.roll_first = embed, nn.ModuleList(stages), roll_first
        self.size, self.batch = size, batch
        if size is not None:
            self._keep(self._plans(*size))

    def forward(self, images: Tensor) -> List[Tuple[Tensor, Any, Any]]:
        """Args:
            images (Tensor): Normalized, shape (B, C, H, W).

        Returns:
            list[tuple]: For each stage with an output its tokens row by row,
            shape (B, h*w, C), h and w.
        """
        embed: Any = self.embed
        x, (height, width) = embed(images)
        if self.size is None:
            plans = self._plans(height, width)
        else:
            (height, width), plans = self.size, self._kept()
        outputs = []
        stage: Any
        for stage, plan in zip(self.stages, plans):
            if plan.merge is not None:
                channels = 4 * x.shape[-1]
                x = _gather(x, plan.merge)
                if plan.merge_valid is not None:
                    x = x * plan.merge_valid
                x = stage.merge(x.reshape(self.batch, -1, channels))
                height, width = padded(height, 2) // 2, padded(width, 2) // 2
            for block, order in zip(stage.blocks, plan.blocks):
                x = block.finish(x, block.attention(block.normalize(x), order, self.batch))
            if stage.output is not None:
                outputs.append((stage.output(x), height, width))
        return outputs

    def _plans(self, height: Any, width: Any) -> List[StagePlan]:
        """Work out what moves where."""
        plans = []
        stage: Any
        for stage in self.stages:
            merge = merge_valid = None
            if stage.merge is not None:
                merge, merge_valid = merge_order(height, width, stage.merge.neighbours)
                merge, merge_valid = merge.reshape(-1), self._padding(merge_valid.reshape(-1, 1))
                height, width = padded(height, 2) // 2, padded(width, 2) // 2
            blocks = []
            for block in stage.blocks:
                order = window_order(height, width, block.window, block.shift, self.roll_first)
                blocks.append(BlockPlan(order.token_of_slot, self._padding(order.valid),
                                        order.slot_of_token, order.kind))
            plans.append(StagePlan(merge, merge_valid, blocks))
        return plans

    def _padding(self, valid: Tensor) -> Optional[Tensor]:
        """None where it is known that there is none."""
        return None if self.size is not None and bool(valid.all()) else valid

    def _keep(self, plans: List[StagePlan]) -> None:
        """Store plans as buffers, so that tracing finds constants; equal ones once."""
        self._names: List[Tuple[Dict[str, str], List[Dict[str, str]]]] = []
        known: Dict[bytes, str] = {}

        def store(table: Any) -> Dict[str, str]:
            names = {}
            for field, value in zip(table._fields, table):
                if isinstance(value, Tensor):
                    value = value if value.is_floating_point() else value.int()
                    key = str(value.dtype).encode() + value.numpy().tobytes()
                    if key not in known:
                        known[key] = f'order_{len(known)}'
                        self.register_buffer(known[key], value)
                    names[field] = known[key]
            return names

        for plan in plans:
            self._names.append((store(plan), [store(block) for block in plan.blocks]))

    def _kept(self) -> List[StagePlan]:
        def read(names: Dict[str, str], field: str) -> Any:
            return getattr(self, names[field]) if field in names else None

        return [StagePlan(read(stage, 'merge'), read(stage, 'merge_valid'),
                          [BlockPlan(*(read(block, field) for field in BlockPlan._fields))
                           for block in blocks])
                for stage, blocks in self._names]


def _times(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1. else x * factor


def _gather(x: Tensor, places: Tensor) -> Tensor:
    return x.index_select(1, places)
