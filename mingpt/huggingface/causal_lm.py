"""Any causal language model of transformers, with what our GPT has: prefixes, placeholders, a loss over targets.

Legend: B batch, T tokens, P prefix positions, C channels of the residual stream, H key/value heads, D channels of a
head, L layers, V vocabulary, K prefixes.

transformers computes the attention. So rotary positions, grouped queries, sliding windows, soft-capping and tied heads
are whatever the model says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mingpt.decoding import generation
from mingpt.decoding.logits_processors import LogitsFunction, LogitsProcessor
from mingpt.distributed.sharding import unshard_before_backward
from mingpt.huggingface import cache as caches
from mingpt.kv_cache import Cache, KeysValues
from mingpt.prefix import Prefix, as_prefix, check_tokens
from mingpt.utils import CfgNode

LOOP_ONLY = ("seed", "row_numbers", "stop_token")
"""What ``generate`` does by our decode loop, as transformers does not know it."""

LOOP_OPTIONS = (*LOOP_ONLY, "do_sample", "temperature", "top_k", "eos_token_id", "pad_token_id")
"""What ``generate`` takes beside constraints: our decode loop's options, and transformers' end-of-text tokens."""


@dataclass(frozen=True, eq=False)
class PaddedPrefix(Prefix):
    """What the rows of a batch begin with: prefixes, of no positions where there are none, and then padding.

    Attributes:
        mask: (B, T - P) of bool, which of the prompt's tokens after the placeholders are no padding.
    """

    mask: Tensor = field(kw_only=True)

    def for_rows(self, indices: Tensor | slice, n_rows: int) -> Prefix:
        return replace(cast(PaddedPrefix, super().for_rows(indices, n_rows)), mask=self.mask[indices])


class CausalLM(nn.Module):
    """A model of transformers, called as our GPT is: ``PrefixTrainer``, ``evaluate`` and plans of steps take it.

    Attributes:
        model: the ``AutoModelForCausalLM``, on which nothing is changed.
        config: n_layer; n_head; n_kv_head, H; head_size, D; n_embd, H * D, the channels of a key_value prefix;
            hidden_size, C, those of a prompt; vocab_size; block_size; architecture, transformers' ``model_type``.
        block_size: the most tokens that it reads, placeholders included.
        prefix_widths: the channels of a prefix of each kind: H * D of a key_value prefix, C of a prompt.
    """

    def __init__(self, model: Any):
        """Wrap a model, and run one token through it to see what it caches.

        Raises:
            ValueError: if its layers do not all cache keys and values of one shape, as in models with recurrent layers.
        """
        super().__init__()
        self.model = model
        text = model.config.get_text_config()
        self._cache = caches.keyword(model)
        with self._layers_with(None), torch.no_grad():
            output = model(torch.zeros(1, 1, dtype=torch.int64, device=self.device), use_cache=True)
        pairs = caches.layer_pairs(getattr(output, self._cache, None))
        shapes = {tuple(each.shape) for pair in pairs for each in pair}
        if len(shapes) != 1 or len(pairs) != text.num_hidden_layers:
            raise ValueError(
                f"{text.model_type} caches {sorted(shapes)} in {len(pairs)} of {text.num_hidden_layers} layers; "
                "expected keys and values of one shape in each, so choose another architecture"
            )
        _, n_kv_head, _, head_size = shapes.pop()
        self.block_size: int = text.max_position_embeddings
        self.config = CfgNode(
            n_layer=len(pairs), n_head=text.num_attention_heads, n_kv_head=n_kv_head, head_size=head_size,
            n_embd=n_kv_head * head_size, hidden_size=text.hidden_size, block_size=self.block_size,
            vocab_size=model.get_input_embeddings().num_embeddings, architecture=text.model_type,
        ).close()  # fmt: skip
        self.prefix_widths = {"key_value": self.config.n_embd, "prompt": self.config.hidden_size}

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.get_input_embeddings().weight.device

    @property
    def blocks(self) -> list[nn.Module]:
        """The decoder's layers, in order."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        return [each for each in self.model.get_decoder().modules() if isinstance(each, GradientCheckpointingLayer)]

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        prefixes: Tensor | Prefix | None = None,
        attention_mask: Tensor | None = None,
        n_last: int | None = None,
        n_shared: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """Predict the token after each token.

        With gradient checkpointing (``model.gradient_checkpointing_enable()``) and a prefix, each layer's activations
        are computed again in the backward pass, also in evaluation mode, in which a frozen model is trained on.

        Args:
            idx: (B, T) of int64; with a prefix the first P are placeholders that are not looked at, and the content's
                positions begin after them, as in PEFT.
            targets: (B, T) the tokens to predict, -1 where none is scored.
            prefixes: a key_value prefix (L, 2, P, H * D), a soft prompt (P, C), or a ``Prefix`` of such a kind; see
                ``mingpt.prefix.as_prefix``.
            attention_mask: (B, T), 0 at padding, 1 elsewhere; what it has at placeholders does not matter.
            n_last: how many last tokens get logits, all by default.
            n_shared: as in ``GPT.forward``, where it saves work; here it changes nothing.

        Returns:
            The logits (B, T, V), or (B, n_last, V), zero at placeholders, where nothing is predicted; and the mean
            cross-entropy in nats over the scored targets, None without targets.

        Raises:
            ValueError: if ``idx`` is not (B, T), its tokens are not from 0 to V - 1 (checked on a CPU), there are more
                than ``block_size``, or the prefix or the mask does not fit.
        """
        prefix = self._check(idx, prefixes, attention_mask)
        options: dict[str, Any] = {"attention_mask": attention_mask, "logits_to_keep": n_last or 0, "use_cache": False}
        start = 0 if prefix is None else prefix.n_placeholders
        if prefix is None:
            logits = self.model(idx, **options).logits
        else:
            cache = caches.read_only(self.transformers_cache(prefix, len(idx)))
            options |= self._mask_and_positions(idx, prefix, attention_mask)
            with self._layers_with(_checkpointed if torch.is_grad_enabled() else None):
                logits = self.model(idx[:, start:], **{self._cache: cache}, **options).logits
        loss = None
        if targets is not None:
            goal = targets[:, -logits.shape[1] :].flatten()
            loss = F.cross_entropy(logits.flatten(0, 1).float(), goal, ignore_index=-1)
        return F.pad(logits, (0, 0, start, 0)) if start and n_last is None else logits, loss

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        prefixes: Tensor | Prefix | None = None,
        attention_mask: Tensor | None = None,
        logits_processors: Sequence[LogitsProcessor | LogitsFunction] = (),
        forbidden_mass_record: list[Tensor] | None = None,
        **options: Any,
    ) -> Tensor:
        """Continue prompts, greedily by default, by transformers' own ``generate``, or by our decode loop.

        It is our loop, ``mingpt.decoding.generate``, where a processor is one of ours, such as a constraint, where the
        forbidden mass is recorded, and where ``seed``, ``row_numbers`` or ``stop_token`` is given. Without constraints
        both choose the same greedy tokens. ``mingpt.decoding.beam_search`` takes this model too.

        Rows of different lengths are padded on the left. Processors see the padding as a part of the prompt, as
        transformers' do. A sliding window counts it, so where it stands between a prefix and the content, the window
        reaches fewer of the prefix's positions, as in PEFT.

        Args:
            idx: (B, T) of int64, the prompts; with a prefix the first P tokens are placeholders.
            max_new_tokens: the most tokens to add.
            prefixes, attention_mask: see ``forward``; padding is on the left.
            logits_processors: those of ``mingpt.decoding``, transformers', or functions (tokens, logits) -> logits. The
                tokens that the last two get include the placeholders, but in our loop they do not.
            forbidden_mass_record: as ``mingpt.decoding.generate`` has it.
            options: of transformers' ``generate``, such as ``do_sample=True``; for our loop those in ``LOOP_OPTIONS``.
                With ``stop_token``, None included, rows end as ``mingpt.decoding.generate`` says, and not with the
                end-of-text tokens of the model's generation config.

        Returns:
            (B, T + n) of int64, prompts and continuations; n is less than ``max_new_tokens`` where every row has met an
            end-of-text token before, and never with ``stop_token``.

        Raises:
            ValueError: as ``forward``, and for padding on the right. In transformers' ``generate``, for a prefix with
                more or fewer placeholders than positions. In our loop, for other options, and where rows with padding
                outgrow ``block_size``; see ``mingpt.decoding.generate``.
        """
        prefix = self._check(idx, prefixes, attention_mask)
        if attention_mask is not None and not attention_mask[:, -1].all():
            row = int((attention_mask[:, -1] == 0).nonzero()[0])
            raise ValueError(f"row {row} has padding on the right; pad on the left: what it ends with is continued")
        is_ours = any(isinstance(each, LogitsProcessor) for each in logits_processors)
        if is_ours or forbidden_mass_record is not None or options.keys() & set(LOOP_ONLY):
            own: dict[str, Any] = {"prefixes": self._padded(idx, prefix, attention_mask, max_new_tokens)}
            own |= {"logits_processors": logits_processors, "forbidden_mass_record": forbidden_mass_record}
            return self._decode(idx, max_new_tokens, own, options)
        mask = torch.ones_like(idx) if attention_mask is None else attention_mask
        if prefix is not None:
            if prefix.n_placeholders != prefix.n_positions:
                sizes = f"{prefix.n_positions} positions and {prefix.n_placeholders} placeholders"
                raise ValueError(f"the prefix has {sizes}; transformers' generate needs as many, so call forward")
            options[self._cache] = self.transformers_cache(prefix, len(idx))
            mask = self._mask_and_positions(idx, prefix, mask)["attention_mask"]
        if logits_processors:
            options["logits_processor"] = list(logits_processors)
        options = {"do_sample": False} | options
        with self._layers_with(None):
            return self.model.generate(idx, attention_mask=mask, max_new_tokens=max_new_tokens, **options)

    def as_key_value(self, prefix: Prefix) -> Prefix:
        """A prefix as the keys and values that it comes to, (K, L, 2, P, H * D); a prompt is run through the model.

        Raises:
            ValueError: if the prefix is on another device than the model.
        """
        if prefix.values.device != self.device:
            raise ValueError(f"the prefix is on {prefix.values.device}, the model on {self.device}; move one of them")
        if prefix.kind == "key_value":
            return prefix
        cache = caches.full_cache()
        with self._layers_with(None):
            self.model(inputs_embeds=prefix.values.to(self.model.dtype), **{self._cache: cache}, use_cache=True)
        for block, pair in zip(self.blocks, caches.layer_pairs(cache), strict=True):
            unshard_before_backward(block, pair)
        pairs = [torch.stack(pair, dim=1) for pair in caches.layer_pairs(cache)]  # (K, 2, H, P, D) each
        return replace(prefix, kind="key_value", values=torch.stack(pairs, dim=1).transpose(-3, -2).flatten(-2))

    def transformers_cache(self, prefix: Prefix, n_rows: int) -> Any:
        """The transformers cache that K prefixes become for a batch of ``n_rows``."""
        values = self.as_key_value(prefix).values.to(self.model.dtype)
        heads = values.unflatten(-1, (self.config.n_kv_head, -1)).transpose(-3, -2)  # (K, L, 2, H, P, D)
        pairs: list[KeysValues] = [(layer[:, 0], layer[:, 1]) for layer in heads.unbind(dim=1)]
        return caches.prefix_cache(pairs, self.model.config, n_rows, prefix.rows)

    def prefix_cache(self, prefix: Prefix) -> Cache:
        """The KV cache that K prefixes become, of K rows, or of B with ``prefix.rows``, for the decode loop."""
        mask, n_rows = None, prefix.n_prefixes if prefix.rows is None else len(prefix.rows)
        if isinstance(prefix, PaddedPrefix):
            mask, n_rows = F.pad(prefix.mask, (prefix.n_positions, 0), value=True), len(prefix.mask)
        return [caches.RowsCache(self.transformers_cache(prefix, n_rows), mask)]

    def forward_cached(
        self, tokens: Tensor, kv_cache: Cache | None = None, *, n_last: int | None = None, start: int | None = None
    ) -> tuple[Tensor, Cache]:
        """Run tokens through the model after a KV cache, for the decode loop.

        Args:
            tokens: (B, T) of int64.
            kv_cache: of ``prefix_cache`` or of an earlier call, of B rows, or of K for B / K consecutive rows each. It
                is written to.
            n_last: how many last tokens get logits, all by default.
            start: the first token's position, the number of cached ones by default.

        Returns:
            The logits (B, T, V), or (B, n_last, V), and the KV cache with the tokens in it.
        """
        rows = cast(caches.RowsCache, kv_cache[0]) if kv_cache else caches.rows_cache(self.model.config)
        rows.expand(len(tokens))
        options: dict[str, Any] = {self._cache: rows.cache, "use_cache": True, "logits_to_keep": n_last or 0}
        start = rows.n_filled if start is None else start
        if rows.mask is not None:
            options["attention_mask"], positions = rows.mask_and_positions(tokens.shape[1])
            options["position_ids"] = (positions + start - rows.n_filled).clamp(min=0)
        elif start != rows.n_filled:  # transformers would count from there
            options["position_ids"] = torch.arange(start, start + tokens.shape[1], device=tokens.device)[None]
        with self._layers_with(None):
            return self.model(tokens, **options).logits, [rows]

    def _check(self, idx: Tensor, prefixes: Tensor | Prefix | None, attention_mask: Tensor | None) -> Prefix | None:
        check_tokens(idx, self.config.vocab_size)
        (batch, n_tokens), prefix = idx.shape, None
        if prefixes is not None:
            prefix = as_prefix(prefixes, self, batch)
            if prefix.n_placeholders >= n_tokens:
                raise ValueError(f"{prefix.n_placeholders} prefix positions leave no content in {n_tokens} tokens")
        if n_tokens > self.block_size:
            raise ValueError(f"{n_tokens} tokens do not fit into block_size = {self.block_size}")
        if attention_mask is not None and attention_mask.shape != idx.shape:
            raise ValueError(
                f"attention_mask has the shape of idx, {tuple(idx.shape)}, got {tuple(attention_mask.shape)}"
            )
        return prefix

    def _padded(self, idx: Tensor, prefix: Prefix | None, mask: Tensor | None, n_new: int) -> Prefix | None:
        """What our decode loop begins with: the prefix, and the padding where there is any."""
        start = 0 if prefix is None else prefix.n_placeholders
        if mask is None or mask[:, start:].all():
            return prefix
        if idx.shape[1] + n_new > self.block_size:
            sizes = f"{idx.shape[1]} tokens and {n_new} new ones do not fit into block_size = {self.block_size}"
            raise ValueError(f"{sizes}, and rows with padding are not cropped; give shorter prompts, or each alone")
        if prefix is None:
            values = torch.zeros(1, self.config.n_layer, 2, 0, self.config.n_embd, device=self.device)
            prefix = Prefix("key_value", values)
        return PaddedPrefix(**vars(prefix), mask=mask[:, start:].bool())

    def _decode(self, idx: Tensor, max_new_tokens: int, own: dict[str, Any], options: dict[str, Any]) -> Tensor:
        """Our decode loop; rows end with transformers' end-of-text tokens, and are filled up with its padding."""
        if unknown := sorted(options.keys() - set(LOOP_OPTIONS)):
            expected = f"our decode loop takes {', '.join(LOOP_OPTIONS)}; got {', '.join(unknown)}"
            raise ValueError(f"{expected}; for beams call mingpt.decoding.beam_search with this model")
        if "stop_token" in options:
            return generation.generate(self, idx, max_new_tokens, **own, **options)
        defaults, n_prompt = self.model.generation_config, idx.shape[1]
        ends = options.pop("eos_token_id", defaults.eos_token_id)
        ends = [ends] if isinstance(ends, int) else list(ends or ())
        pad = options.pop("pad_token_id", defaults.pad_token_id)
        tokens = generation.generate(self, idx, max_new_tokens, stop_token=ends, **own, **options)
        is_end = torch.isin(tokens[:, n_prompt:], idx.new_tensor(ends))
        is_after = is_end.cumsum(dim=1) > is_end
        tokens[:, n_prompt:][is_after] = pad if pad is not None else next(iter(ends), 0)
        return tokens[:, : n_prompt + int((~is_after).any(dim=0).sum())]

    def _mask_and_positions(self, idx: Tensor, prefix: Prefix, mask: Tensor | None) -> dict[str, Any]:
        """The mask over prefix and content, and the content's positions where transformers would count others."""
        start, n_positions = prefix.n_placeholders, prefix.n_positions
        found: dict[str, Any] = {}
        if mask is not None:
            found["attention_mask"] = torch.cat([mask.new_ones(len(idx), n_positions), mask[:, start:]], dim=1)
        if start != n_positions:
            found["position_ids"] = torch.arange(start, idx.shape[1], device=idx.device)[None]
        return found

    @contextmanager
    def _layers_with(self, wrap: Callable[[Callable], Callable] | None) -> Iterator[None]:
        """Replace transformers' gradient checkpointing, which would take the cache from the layers, by ``wrap``.

        Here a layer can be computed twice with a prefix, as the cache that it reads does not change.
        """
        from transformers.modeling_layers import GradientCheckpointingLayer

        flagged: list[Any] = [each for each in self.model.modules() if getattr(each, "gradient_checkpointing", False)]
        layers = [each for each in flagged if isinstance(each, GradientCheckpointingLayer)]
        for layer in layers:
            forward = partial(_without_checkpointing, layer, layer.forward)
            layer.forward = forward if wrap is None else wrap(forward)
        for module in flagged:
            module.gradient_checkpointing = False
        try:
            yield
        finally:
            for layer in layers:
                del layer.forward  # the class's own shows again
            for module in flagged:
                module.gradient_checkpointing = True


def _checkpointed(forward: Callable) -> Callable:
    return partial(checkpoint, forward, use_reentrant=False)


def _without_checkpointing(layer: Any, forward: Callable, *arguments: Any, **options: Any) -> Any:
    before, layer.gradient_checkpointing = layer.gradient_checkpointing, False  # it is set again in the backward pass
    try:
        return forward(*arguments, **options)
    finally:
        layer.gradient_checkpointing = before
