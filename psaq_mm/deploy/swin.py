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
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn

from psaq_mm.ops import QuantOp

from .activation_form import RoundForm
from .export_forms import quantize_input, split_linear
from .window_order import (
    Grid,
    MergeOrder,
    Window,
    WindowOrder,
    merge_order,
    padded,
    shift_masks,
    window_order,
)

Order = Union[WindowOrder, MergeOrder]


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

    def forward(self, x: Tensor, order: 'Moves', batch: int) -> Tensor:
        """Args:
            x (Tensor): Tokens row by row, shape (B, L, C).
            order (Moves): Where they go.
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


class Moves(NamedTuple):
    """Where tokens go in a block."""
    enter: Tensor  # row by row to windows
    valid: Optional[Tensor]  # 1 or 0 for padding; None without padding
    leave: Tensor  # windows to row by row
    kind: Tensor


class KeptOrder(nn.Module):
    """An order for one size as buffers, so that tracing finds constants.

    Args:
        order (WindowOrder or MergeOrder): The order.
    """

    def __init__(self, order: Order) -> None:
        super().__init__()
        self.type: Any = type(order)
        self.padded = bool((order.valid.product() == 0).any())
        for field, grid in zip(order._fields, order):
            for axis, values in zip(grid._fields, grid):
                values = values if values.is_floating_point() else values.int()
                self.register_buffer(f'{field}_{axis}', values)

    def forward(self) -> Order:
        order: Order = self.type(*(
            Grid(*(getattr(self, f'{field}_{axis}') for axis in Grid._fields))
            for field in self.type._fields))
        return order


class StageForm(nn.Module):
    """Patch merging, if any, blocks, and the norm of the stage's output, if it
    has one.

    Args:
        merge (MergeForm, optional): Patch merging before the blocks.
        blocks (Sequence[BlockForm]): The blocks.
        output (nn.Module, optional): The norm.
    """

    def __init__(self, merge: Optional[MergeForm], blocks: Sequence[BlockForm],
                 output: Optional[nn.Module]) -> None:
        super().__init__()
        self.merge, self.blocks, self.output = merge, nn.ModuleList(blocks), output
        self.kept: Optional[nn.ModuleDict] = None

    def size_after(self, height: Any, width: Any) -> Tuple[Any, Any]:
        """Height and width of the tokens in the blocks."""
        if self.merge is None:
            return height, width
        return padded(height, 2) // 2, padded(width, 2) // 2

    def orders(self, height: Any, width: Any, roll_first: bool) -> Dict[str, Order]:
        """Work out what moves where: ``merge``, and one for each shift of windows."""
        found: Dict[str, Order] = {}
        if self.merge is not None:
            found['merge'] = merge_order(height, width, self.merge.neighbours)
        height, width = self.size_after(height, width)
        block: Any
        for block in self.blocks:
            name = _order_of(block)
            if name not in found:
                found[name] = window_order(height, width, block.window, block.shift, roll_first)
        return found

    def keep(self, height: int, width: int, roll_first: bool) -> None:
        """Work it out for one size, once and for all."""
        self.kept = nn.ModuleDict({name: KeptOrder(order) for name, order in
                                   self.orders(height, width, roll_first).items()})

    def forward(self, x: Tensor, height: Any, width: Any, roll_first: bool,
                batch: int) -> Tensor:
        """Args:
            x (Tensor): Tokens row by row, shape (B, H*W, C).
            height (int or Tensor): H.
            width (int or Tensor): W.
            roll_first (bool): Whether the host rolls before it pads.
            batch (int): B.

        Returns:
            Tensor: Tokens after the blocks.
        """
        kept: Any = self.kept
        orders: Any = self.orders(height, width, roll_first) if kept is None \
            else {name: order() for name, order in kept.items()}

        def valid(name: str) -> Optional[Tensor]:
            without = kept is not None and not kept[name].padded
            return None if without else orders[name].valid.product()

        if self.merge is not None:
            channels = 4 * x.shape[-1]
            x = _gather(x, orders['merge'].token.sum())
            padding = valid('merge')
            x = x if padding is None else x * padding
            x = self.merge(x.reshape(batch, -1, channels))
        # Blocks with the same windows share what is computed here.
        moves = {name: Moves(order.token_of_slot.sum(), valid(name), order.slot_of_token.sum(),
                             order.kind.sum())
                 for name, order in orders.items() if name != 'merge'}
        block: Any
        for block in self.blocks:
            attended = block.attention(block.normalize(x), moves[_order_of(block)], batch)
            x = block.finish(x, attended)
        return x


def _order_of(block: BlockForm) -> str:
    return 'window_{}_{}_shift_{}_{}'.format(*block.window, *block.shift)


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
            height, width = size
            for stage in stages:
                stage.keep(height, width, roll_first)
                height, width = stage.size_after(height, width)

    def forward(self, images: Tensor) -> List[Tuple[Tensor, Any, Any]]:
        """Args:
            images (Tensor): Normalized, shape (B, C, H, W).

        Returns:
            list[tuple]: For each stage with an output its tokens row by row,
            shape (B, h*w, C), h and w.
        """
        embed: Any = self.embed
        x, (height, width) = embed(images)
        height, width = self.size or (height, width)
        outputs = []
        stage: Any
        for stage in self.stages:
            x = stage(x, height, width, self.roll_first, self.batch)
            height, width = stage.size_after(height, width)
            if stage.output is not None:
                outputs.append((stage.output(x), height, width))
        return outputs


def _times(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1. else x * factor


def _gather(x: Tensor, places: Tensor) -> Tensor:
    return x.index_select(1, places)
