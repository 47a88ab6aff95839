"""What each rank of a group checks, in a process of its own: `run_ranks("parallel_checks:…", …)`."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import shutil
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel

import longnet
from longnet import DilationPattern, LongNetConfig, LongNetForCausalLM, dilated_attention
from longnet.attention import halo, sequence_parallel
from longnet.bench import distributed
from longnet.measurement import peak_bytes
from longnet.model.versions import checkpoint_layers
from longnet.training.chunked import ChunkedStep
from longnet.training.config import ParallelConfig
from longnet.training.gradients import accumulate_gradients
from longnet.training.parallel import Ranks, whole

PATTERN = DilationPattern((8, 20, 64), (1, 3, 8))


def edges_of(tokens, ranks):
    """Uneven slices: the last rank's is the shortest."""
    size = -(-tokens // ranks)
    return [min(tokens, rank * size) for rank in range(ranks + 1)]


class Watched:
    """What the op does with the other ranks, in order, and the bytes that its exchanges bring."""

    PLACES = (
        (sequence_parallel, "_exchange"),
        (sequence_parallel, "_wait"),
        (halo, "attend_tiles"),
        (halo, "differentiate_tiles"),
    )

    def __enter__(self):
        self.order, self._counting = [], sequence_parallel.counted_exchanges()
        self.received = self._counting.__enter__()
        self._kept = {(place, name): getattr(place, name) for place, name in self.PLACES}
        for (place, name), function in self._kept.items():
            setattr(place, name, functools.partial(self._call, name, function))
        return self

    def _call(self, name, function, *args, **kwargs):
        result = function(*args, **kwargs)
        self.order.append(name)
        return result

    def __exit__(self, *error):
        self._counting.__exit__(*error)
        for (place, name), function in self._kept.items():
            setattr(place, name, function)


def inputs(batch=2, heads=4, kv_heads=2, tokens=101, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    shapes = [(batch, heads, tokens, 16), (batch, kv_heads, tokens, 16), (batch, kv_heads, tokens, 16)]
    shapes.append(shapes[0])
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def attention(rank, ranks):
    """The op on slices against the op on the whole: worst differences by case, and bytes against the closed form."""
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("sp",))["sp"]
    worst, traffic = {}, []
    padding = torch.zeros(2, 101, dtype=torch.bool)
    padding[0, 37:], padding[1, :90] = True, True
    documents = torch.tensor([0, 5, 5, 60, 101], dtype=torch.int32)
    dense = replace(PATTERN, queries="all")
    for pattern, dtype, is_causal, mask in itertools.product(
        (PATTERN, dense), (torch.float64, torch.float32, torch.bfloat16), (True, False), (None, "padding", "documents")
    ):
        *whole, dout = inputs(batch=1 if mask == "documents" else 2, dtype=dtype)
        masks = {"padding": {"padding_mask": padding}, "documents": {"cu_seqlens": documents}}.get(mask, {})
        sinks = torch.arange(4, dtype=dtype) if pattern is dense else None  # one a head
        learned = [] if sinks is None else [sinks.requires_grad_()]
        whole = [x.requires_grad_() for x in whole]
        out, lse = dilated_attention(*whole, pattern, is_causal=is_causal, return_lse=True, sinks=sinks, **masks)
        expected = [out, lse, *torch.autograd.grad(out, [*whole, *learned], dout)]
        edges = edges_of(101, ranks)
        here = slice(edges[rank], edges[rank + 1])
        if mask == "padding":
            masks = {"padding_mask": padding[:, here]}
        mine = [x.detach()[:, :, here].requires_grad_() for x in whole]
        with Watched() as counted:
            out, lse = dilated_attention(
                *mine, pattern, is_causal=is_causal, mesh=mesh, return_lse=True, sinks=sinks, **masks
            )
            found = [out, lse, *torch.autograd.grad(out, [*mine, *learned], dout[:, :, here])]
        if learned:
            dist.all_reduce(found[-1])  # each rank has its queries' share
        for name, a, b in zip(("out", "lse", "dq", "dk", "dv", "dsinks"), found, expected, strict=False):
            here_alone = b if name == "dsinks" else b[:, :, here]
            assert torch.equal(a.isinf(), here_alone.isinf())
            a, b = (x.double().nan_to_num(0, 0, 0) for x in (a, here_alone))  # noqa: PLW2901
            worst[str(dtype), pattern.queries, is_causal, mask, name] = ((a - b).abs().max() / b.abs().max()).item()
        if mask is None:
            closed = pattern.traffic(
                tokens=101, ranks=ranks, num_kv_heads=2, head_dim=16, itemsize=dtype.itemsize, is_causal=is_causal
            )
            sent_back = counted.received[1:]
            traffic.append((counted.received[:1], [2 * closed[rank]], sent_back, counted.order))
    return worst, traffic


def failures(rank, ranks):
    """What every rank is told, in words, and that none hangs."""
    group, messages = dist.group.WORLD, []
    q, k, v, _ = inputs(batch=1, heads=2, tokens=8)

    def attempt(*tensors, **masks):
        try:
            dilated_attention(*tensors, PATTERN, mesh=group, **masks)
        except (ValueError, TypeError) as error:
            messages.append(str(error))

    mask = torch.ones(1, 8, dtype=torch.bool)
    mask[0, -1] = rank != 0  # a gap between the ranks, whole on each
    attempt(q, k, v, padding_mask=mask)
    attempt(q[:, :, :4], k, v)
    attempt(q, k, v, backend="reference")
    return messages


def model(rank, ranks):
    """LongNet on slices against LongNet on the whole: loss and weights' gradients after adding them up."""
    group, worst = dist.group.WORLD, {}
    ids = torch.randint(0, 64, (2, 101), generator=torch.Generator().manual_seed(5))
    edges = edges_of(101, ranks)
    here = slice(edges[rank], edges[rank + 1])
    mask = torch.ones_like(ids)
    mask[1, :70] = 0
    for positions, padded, is_checkpointed in [("xpos", False, False), ("rope", True, False), ("rope", False, True)]:
        torch.manual_seed(0)
        config = LongNetConfig(
            attn_implementation="dilated", vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, position_embedding=positions, segment_lengths=[8, 32, 128], dilation_rates=[1, 2, 8],
        )  # fmt: skip
        net = LongNetForCausalLM(config).double().train()
        masks = {"attention_mask": mask} if padded else {}
        labels = ids.masked_fill(mask == 0, -100) if padded else ids
        loss = net(ids, labels=labels, **masks).loss
        loss.backward()
        expected = [parameter.grad for parameter in net.parameters()]
        net.zero_grad()
        if is_checkpointed:
            checkpoint_layers(net)
        if padded:
            masks = {"attention_mask": mask[:, here]}
        with longnet.sequence_parallel(group):
            share = net(ids[:, here], labels=labels[:, here], **masks).loss
            share.backward()
        for parameter in net.parameters():
            dist.all_reduce(parameter.grad)
        gradients = zip(expected, net.parameters(), strict=True)
        worst[positions, padded, is_checkpointed] = (
            abs(share.item() - loss.item()) / loss.item(),
            max(((a - b.grad).abs().max() / a.abs().max()).item() for a, b in gradients),
        )
    return worst


def shared_out(rank, ranks, device="cpu"):
    """The trainer's gradients on P × P ranks, weights shared out by FSDP2, against one device: relative errors."""
    side = math.isqrt(ranks)
    config = ParallelConfig(dp=side, sp=side)
    axes = init_device_mesh(device, (side, side), mesh_dim_names=("dp", "sp"))
    shards = init_device_mesh(device, (ranks,))
    shared = Ranks(config=config, device=torch.device(device), rank=rank, axes=axes, shards=shards)
    generator = torch.Generator().manual_seed(5)
    ids, targets = (torch.randint(0, 64, (4, 101), generator=generator).to(device) for _ in "it")
    (row, column), share = divmod(rank, side), 4 // side
    rows, columns = slice(share * row, share * row + share), slice(*(101 * (column + at) // side for at in (0, 1)))
    torch.manual_seed(0)
    net = LongNetForCausalLM(
        LongNetConfig(
            attn_implementation="dilated", vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, segment_lengths=[8, 32, 128], dilation_rates=[1, 2, 8],
        )
    ).double().train().to(device)  # fmt: skip
    plain = contextlib.nullcontext()
    accumulate_gradients(net, ids, targets, parts=1, autocast=plain)
    expected = {name: parameter.grad for name, parameter in net.named_parameters()}
    net.zero_grad()
    trained = shared.share_out(net, compiled=False)
    with shared.sequence():
        accumulate_gradients(
            trained, ids[rows, columns], targets[rows, columns], parts=2, items=targets.numel(), autocast=plain
        )
    errors = {}
    for name, parameter in net.named_parameters():
        found, want = whole(parameter.grad), expected[name]
        errors[name] = ((found - want).abs().max() / want.abs().max()).item()
    return errors


def chunked_shared_out(rank, ranks, folder, loser, device="cpu"):
    """A step in chunks on ranks with FSDP2, saved, and resumed where a rank has one save less: errors, and where.

    The rank `loser`, if there is one, has lost its log.
    """
    config, shards = ParallelConfig(dp=ranks), init_device_mesh(device, (ranks,))
    shared = Ranks(config=config, device=torch.device(device), rank=rank, shards=shards)
    generator = torch.Generator().manual_seed(5)
    ids, targets = (torch.randint(0, 64, (2 * ranks, 101), generator=generator).to(device) for _ in "it")
    torch.manual_seed(0)
    net = LongNetForCausalLM(
        LongNetConfig(
            attn_implementation="dilated", vocab_size=64, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, segment_lengths=[8, 32, 128], dilation_rates=[1, 2, 8],
        )
    ).double().train().to(device)  # fmt: skip
    accumulate_gradients(net, ids, targets, parts=1, autocast=contextlib.nullcontext())
    expected = {name: parameter.grad for name, parameter in net.named_parameters()}
    net.zero_grad()
    checkpoint_layers(net)
    trained = shared.share_out(net, compiled=False)
    mine = slice(2 * rank, 2 * rank + 2)
    own = Path(folder) / f"step-{rank}"

    def step():
        return ChunkedStep(
            trained, lambda start, stop: (ids[mine, start:stop], targets[mine, start:stop]), sequences=2, tokens=101,
            chunk_tokens=16, items=targets.numel(), parts=2, folder=own, group=dist.group.WORLD,
        )  # fmt: skip

    with step() as first:  # 13 chunks of each part, the first 6 of them are read
        for progress in first:
            if first.done in (3, 16):
                first.save()
                (kept,) = own.glob("step-*.safetensors")
                shutil.copy(kept, own.with_suffix(f".{first.done}"))
            if first.done == 21:
                found = [first.done, progress.is_learning]
                first.save()
                break
    shutil.copy(own.with_suffix(".16"), own / "step-16.safetensors")
    if rank:  # killed before it had saved
        (own / "step-21.safetensors").unlink()
    if rank == loser:
        (own / "rows-1-0.log").unlink()
    net.zero_grad()
    with step() as second:
        found += [second.done, second.reread]
        for _ in second:
            pass
    errors = {}
    for name, parameter in net.named_parameters():
        got, want = whole(parameter.grad), expected[name]
        errors[name] = ((got - want).abs().max() / want.abs().max()).item()
    return found, errors


def other_models(rank, ranks):
    """A Llama and a BERT, unchanged, on slices: worst difference of the last hidden states, and what is refused."""
    group, worst, messages = dist.group.WORLD, {}, []
    ids = torch.randint(0, 64, (2, 61), generator=torch.Generator().manual_seed(5))
    edges = edges_of(61, ranks)
    here = slice(edges[rank], edges[rank + 1])
    small = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "attention_probs_dropout_prob": 0.0,
    }  # fmt: skip
    for make, config in [(LlamaModel, LlamaConfig), (BertModel, BertConfig)]:
        torch.manual_seed(0)
        net = make(config(**small)).double().eval()
        longnet.use_dilated_attention(net, PATTERN)
        expected = net(ids).last_hidden_state[:, here]
        with longnet.sequence_parallel(group, net):
            found = net(ids[:, here]).last_hidden_state
        worst[make.__name__] = (found - expected).abs().max().item()
        if make is LlamaModel:
            with longnet.sequence_parallel(group):
                try:
                    net(ids[:, here])
                except ValueError as error:
                    messages.append(str(error))
            edges_of_documents = torch.tensor([0, 30, 61], dtype=torch.int32)
            positions = torch.cat([torch.arange(30), torch.arange(31)])[None]
            packed = {"cu_seq_lens_q": edges_of_documents, "cu_seq_lens_k": edges_of_documents, "use_cache": False}
            expected = net(ids[:1], position_ids=positions, **packed).last_hidden_state[:, here]
            with longnet.sequence_parallel(group, net):
                found = net(ids[:1, here], position_ids=positions[:, here], **packed).last_hidden_state
            worst["packed"] = (found - expected).abs().max().item()
    return worst, messages


def bench_gate(rank, ranks, settings):
    """What `longnet bench distributed` says where keys of the other ranks are lost, and where rows go astray."""
    messages, halo, traffic = [], sequence_parallel.make_halo, DilationPattern.traffic
    for name, at, wrong in [
        ("make_halo", sequence_parallel, lambda *a: torch.zeros_like(halo(*a))),
        ("traffic", DilationPattern, lambda *a, **b: tuple(count + 8 for count in traffic(*a, **b))),
    ]:
        right = getattr(at, name)
        setattr(at, name, wrong)
        try:
            distributed.measure(settings)
        except distributed.GateError as error:
            messages.append(str(error))
        setattr(at, name, right)
    return messages


def saved_bytes(rank, ranks, pattern, cases):
    """What autograd keeps of a slice of 1023 tokens for the backward pass of two layers, in bytes, case by case."""
    found = []
    for fields, options in cases:
        two, four = (
            _saved(LongNetConfig.preset("tiny", num_hidden_layers=layers, **pattern, **fields), ranks, **options)
            for layers in (2, 4)
        )
        found.append(four - two)
    return found


def _saved(config, ranks, *, bfloat16=False, checkpoint_activations=False):
    net, storages = LongNetForCausalLM(config).train(), {}
    if checkpoint_activations:
        checkpoint_layers(net)

    def keep(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    ids = torch.randint(0, 320, (2, 1023))
    with (
        longnet.sequence_parallel(dist.group.WORLD) if ranks > 1 else contextlib.nullcontext(),
        torch.autocast("cpu", torch.bfloat16, enabled=bfloat16),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
    ):
        loss = net(ids, labels=ids).loss
    assert loss.requires_grad  # as long as it lives, so does what was kept, each at an address of its own
    weights = {weight.untyped_storage().data_ptr() for weight in net.parameters()}
    linear = [module for module in net.model.layers.modules() if isinstance(module, torch.nn.Linear)]
    # What autocast has cast of the weights is counted with the weights.
    copies = 2 * sum(module.weight.numel() for module in linear) if bfloat16 else 0
    return sum(size for at, size in storages.items() if at not in weights) - copies


def held_bytes(rank, ranks, pattern, cases):
    """By how much two steps of training with FSDP2, on slices of 511 tokens, raise a rank's peak memory."""
    mesh, cpu, found = init_device_mesh("cpu", (ranks,)), torch.device("cpu"), []

    def train(fields, options, tokens):
        net = LongNetForCausalLM(LongNetConfig.preset("tiny", **pattern, **fields)).train()
        if options.get("checkpoint_activations"):
            checkpoint_layers(net)
        for module in (*net.model.layers, net):
            fully_shard(module, mesh=mesh)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
        optimizer = torch.optim.AdamW(net.parameters(), fused=True)
        for _ in range(2):
            ids = torch.randint(0, 320, (2, tokens))
            with longnet.sequence_parallel(mesh):
                with torch.autocast("cpu", torch.bfloat16, enabled=options.get("bfloat16", False)):
                    loss = net(ids, labels=ids).loss
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    for fields, options in cases:
        train({}, options, 128)  # libraries load their parts
        before = peak_bytes(cpu, reset=True)
        train(fields, options, 511)
        found.append(peak_bytes(cpu) - before)
    return found
