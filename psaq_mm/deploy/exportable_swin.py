# Copyright (c) psaq_mm contributors. Licensed under the Apache License 2.0.
"""A Swin Transformer in the form that engines run fastest.

It differs from the hosts' in these points, none of which changes a result:

- Pad, roll and window partition are one gather; their reverse is another. Both
  move integers, as they come between a quantizer and the layer behind it: a
  quarter of the bytes.
- Patch merging is one gather too.
- Query, key and value are three linear layers, so that no copy separates them.
- The mask of shifted windows is one of four, looked up by the kind of window.
"""
from functools import partial
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn

from .exportable_ops import (
    product,
    quantize,
    quantize_input,
    quantizer_of,
    split_linear,
    without_sizes,
)
from .exportable_quantizer import ExportableRounding
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


class Moves(NamedTuple):
    """Where tokens go in a block.

    Args:
        enter (Tensor): Token of each slot of the windows.
        valid (Tensor, optional): 1 for slots with a token, 0 for padding; None
            if there is no padding.
        leave (Tensor): Slot of each token.
        kind (Tensor): Kind of each window, an index into the masks.
    """
    enter: Tensor
    valid: Optional[Tensor]
    leave: Tensor
    kind: Tensor


class ExportableAttention(nn.Module):
    """Window attention on tokens row by row, with a precomputed bias.

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
        bias = quantize(attention, 'bias_table', bias.detach())
        # Pairs of tokens with the same offset have the same bias. Files hold it once, and
        # engines expand it when they load the graph.
        table, index = torch.unique(bias.flatten(1), dim=1, return_inverse=True)
        self.register_buffer('table', table)
        self.register_buffer('index', index.int())
        self.register_buffer('masks', shift_masks(window, shift))

    def _heads(self, x: Tensor) -> Tensor:
        """Separate the heads: shape (num_windows*B, heads, N, head_dim)."""
        heads = self.host.num_heads
        return x.reshape(-1, self.area, heads, x.shape[-1] // heads).permute(0, 2, 1, 3)

    def forward(self, x: Tensor, moves: Moves, batch: int) -> Tensor:
        """Args:
            x (Tensor): Tokens row by row, shape (B, L, C).
            moves (Moves): Where they go.
            batch (int): B.

        Returns:
            Tensor: Shape (B, L, C).
        """
        channels = x.shape[-1]
        if moves.valid is None:
            x, sizes = quantize_input(self.host.qkv, x, partial(_gather, places=moves.enter))
        else:
            x = _gather(x, moves.enter) * moves.valid  # padding is zero
            x, sizes = quantize_input(self.host.qkv, x)
        # Operands are quantized before the heads are separated: engines do it in the layer.
        q, q_step = _operand(quantizer_of(self.host, 'query'), product(self.q, x, sizes),
                             float(self.host.scale))
        k, k_step = _operand(quantizer_of(self.host, 'key'), product(self.k, x, sizes))
        v, v_step = _operand(quantizer_of(self.host, 'value'), product(self.v, x, sizes))
        q, k = self._heads(q), self._heads(_times(k, q_step * k_step))
        bias = self.table.index_select(1, self.index)
        bias = bias.reshape(1, self.host.num_heads, self.area, self.area)
        logits = quantize(self.host, 'logits', q @ k.transpose(-2, -1)) + bias
        if self.masks is not None:
            kind = moves.kind.repeat(batch) if batch > 1 else moves.kind
            logits = logits + self.masks[kind].unsqueeze(1)
        out = self._weighted(logits.softmax(dim=-1), v, v_step)
        out = out.transpose(1, 2).reshape(batch, -1, channels)
        return product(self.host.proj, *quantize_input(
            self.host.proj, out, partial(_gather, places=moves.leave)))

    def _weighted(self, weights: Tensor, v: Tensor, v_step: float) -> Tensor:
        """Values, weighted by softmax outputs. Sizes of their rows come in behind the product."""
        quantizer, weights, sizes = without_sizes(quantizer_of(self.host, 'attention'), weights)
        weights, step = _operand(quantizer, weights)
        out = weights @ self._heads(_times(v, v_step * step))
        return out if sizes is None else out * sizes


class ExportableBlock(nn.Module):
    """A block of Swin. A subclass for each host knows its attributes.

    Args:
        block (nn.Module): The host's block, or its quantized op.
        attention (nn.Module): Its window attention, or the quantized op of it.
        bias (Tensor): Relative position bias, shape (heads, N, N).
        window (tuple[int, int]): Height and width of a window.
        shift (tuple[int, int]): Cyclic shift.
    """

    def __init__(self, block: Any, attention: nn.Module, bias: Tensor, window: Window,
                 shift: Window) -> None:
        super().__init__()
        self.host, self.window, self.shift = block, window, shift
        self.attention = ExportableAttention(attention, bias, window, shift)

    @property
    def order_name(self) -> str:
        """str: A name that is the same for blocks with the same windows."""
        return 'window_{}_{}_shift_{}_{}'.format(*self.window, *self.shift)

    def feed_forward(self, x: Tensor) -> Tensor:
        """The second half of the block with its residual, on (B, L, C)."""
        raise NotImplementedError

    def forward(self, x: Tensor, moves: Moves, batch: int) -> Tensor:
        x = x + self.attention(self.host.norm1(x), moves, batch)
        x = self.feed_forward(quantize(self.host, 'attention_residual', x))
        return quantize(self.host, 'ffn_residual', x)


class ExportableMerging(nn.Module):
    """Norm and linear layer of patch merging, on (B, L / 4, 4 * C).

    Args:
        norm (nn.Module, optional): The norm.
        reduction (nn.Module): The linear layer.
        neighbours (tuple): Offsets (down, right) of the four patches in the
            order of the channels.
        order (Tensor, optional): Where the linear layer finds each of its channels. Defaults to
            None: they are in order.
    """

    def __init__(self, norm: Optional[nn.Module], reduction: nn.Module,
                 neighbours: Tuple[Window, ...], order: Optional[Tensor] = None) -> None:
        super().__init__()
        self.norm, self.reduction, self.neighbours = norm, reduction, neighbours
        self.order: Optional[Tensor]
        self.register_buffer('order', order)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm is not None:
            x = self.norm(x)
        return self.reduction(x if self.order is None else x[..., self.order])


class FixedOrder(nn.Module):
    """An order of tokens for one size, in buffers: the trace sees constants.

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


class ExportableStage(nn.Module):
    """Patch merging, blocks, and the norm of the stage's output.

    Args:
        merge (ExportableMerging, optional): Patch merging before the blocks.
        blocks (Sequence[ExportableBlock]): The blocks.
        output (nn.Module, optional): The norm; None if the stage has no output.
    """

    def __init__(self, merge: Optional[ExportableMerging], blocks: Sequence[ExportableBlock],
                 output: Optional[nn.Module]) -> None:
        super().__init__()
        self.merge, self.blocks, self.output = merge, nn.ModuleList(blocks), output
        self.fixed: Optional[nn.ModuleDict] = None

    def size_after(self, height: Any, width: Any) -> Tuple[Any, Any]:
        """Height and width of the feature map in the blocks."""
        if self.merge is None:
            return height, width
        return padded(height, 2) // 2, padded(width, 2) // 2

    def orders(self, height: Any, width: Any, roll_first: bool) -> Dict[str, Order]:
        """Compute the orders of tokens: ``merge``, and one for each kind of block."""
        found: Dict[str, Order] = {}
        if self.merge is not None:
            found['merge'] = merge_order(height, width, self.merge.neighbours)
        height, width = self.size_after(height, width)
        block: Any
        for block in self.blocks:
            if block.order_name not in found:
                found[block.order_name] = window_order(height, width, block.window, block.shift,
                                                       roll_first)
        return found

    def fix(self, height: int, width: int, roll_first: bool) -> None:
        """Compute the orders of tokens once, for feature maps of one size."""
        self.fixed = nn.ModuleDict({name: FixedOrder(order) for name, order in
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
        fixed: Any = self.fixed
        orders: Any = self.orders(height, width, roll_first) if fixed is None \
            else {name: order() for name, order in fixed.items()}

        def valid(name: str) -> Optional[Tensor]:
            without = fixed is not None and not fixed[name].padded
            return None if without else orders[name].valid.product()

        if self.merge is not None:
            channels = 4 * x.shape[-1]
            x = _gather(x, orders['merge'].token.sum())
            padding = valid('merge')
            x = x if padding is None else x * padding
            x = self.merge(x.reshape(batch, -1, channels))
        # Computed once for all blocks with the same windows.
        moves = {name: Moves(order.token_of_slot.sum(), valid(name), order.slot_of_token.sum(),
                             order.kind.sum())
                 for name, order in orders.items() if name != 'merge'}
        block: Any
        for block in self.blocks:
            x = block(x, moves[block.order_name], batch)
        return x


class ExportableSwin(nn.Module):
    """The whole backbone.

    Args:
        embed (Callable): Maps images (B, C, H, W) to tokens (B, h*w, C) and
            (h, w).
        stages (Sequence[ExportableStage]): The stages.
        roll_first (bool): Whether the host rolls before it pads.
        size (tuple[int, int], optional): Height and width of the feature map
            that ``embed`` gives; None if they vary. Defaults to None.
        batch (int): Number of images at once. Defaults to 1.
    """

    def __init__(self, embed: Callable[[Tensor], Tuple[Tensor, Tuple[Any, Any]]],
                 stages: Sequence[ExportableStage], roll_first: bool,
                 size: Optional[Window] = None, batch: int = 1) -> None:
        super().__init__()
        self.embed, self.stages, self.roll_first = embed, nn.ModuleList(stages), roll_first
        self.size, self.batch = size, batch
        if size is not None:
            height, width = size
            for stage in stages:
                stage.fix(height, width, roll_first)
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


def _operand(quantizer: nn.Module, x: Tensor, factor: float = 1.) -> Tuple[Tensor, float]:
    """Quantize ``factor * x`` for a matrix product.

    Returns:
        tuple: The operand, and the number that the product has to be multiplied by. It is the
        step of a rounded operand, which is left out here so that the steps of both operands are
        multiplied in once.
    """
    if isinstance(quantizer, ExportableRounding):
        return quantizer.integers(x, factor), quantizer.step
    return quantizer(_times(x, factor)), 1.


def _times(x: Tensor, factor: float) -> Tensor:
    return x if factor == 1. else x * factor


def _gather(x: Tensor, places: Tensor) -> Tensor:
    return x.index_select(1, places)
