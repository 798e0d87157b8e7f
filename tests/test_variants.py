"""The variants of the cell, alone and in pairs, through the kernels and as the module has them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from engines import Engine
from layers import Case, arguments, assert_as_good_as_torch, backward_of, by_kernels
from torch import Tensor, nn

import lstm_triton
from lstm_triton import LSTM, LSTMCell, functional
from lstm_triton.kernels.config import Cell, Config, chance
from lstm_triton.reference import masks as philox
from lstm_triton.variant import Variant

SAMPLED = {"sampled": True}
# Each as a change of a Case: of its own fields, and of its cell's.
FLAGS: dict[str, tuple[dict, dict]] = {
    "peephole": (dict(peephole=True), {}),
    "layer_norm": (dict(norm=True), {}),
    "zoneout_h": ({}, SAMPLED | dict(zoneout_h=chance(0.3))),
    "zoneout_c": ({}, SAMPLED | dict(zoneout_c=chance(0.4))),
    "recurrent_dropout": ({}, SAMPLED | dict(recurrent_dropout=chance(0.3))),
    "variational_dropout": ({}, SAMPLED | dict(variational_x=chance(0.3), variational_h=chance(0.4))),
    "cell_clip": ({}, dict(cell_clip=0.5)),
    "recurrent_grad_clip": ({}, dict(recurrent_grad_clip=0.125)),
    "coupled_gates": ({}, dict(coupled_gates=True)),
}
EVERYTHING = Case(directions=2, lengths=True, reset=True, batch_first=True, batch=5, seq_len=6, seed=2)
# H = 20: one program with a tail, or two hidden tiles of 16.
CONFIGS = {
    "local": Config("local", "none", True, False, 1, 16, 32, 32, 4),
    "mailbox": Config("grid", "mailbox", True, False, 2, 16, 16, 32, 4),
    "flags": Config("grid", "flags", False, True, 1, 16, 16, 16, 4),
    "stepwise": Config("stepwise", "none", True, False, 1, 16, 32, 32, 4),
}


def case_of(base: Case, *flags: str) -> Case:
    fields, cell = {}, {}
    for flag in flags:
        fields |= FLAGS[flag][0]
        cell |= FLAGS[flag][1]
    return replace(base, cell=Cell(**cell), **fields)


def check(engine: Engine, case: Case, config: Config) -> None:
    with engine(case.seed):
        ours = by_kernels(case, config)
    assert_as_good_as_torch(ours, case)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("flag", FLAGS)
def test_each_alone(engine: Engine, flag: str, config: Config) -> None:
    """Every output and gradient, with two directions, lengths and resets."""
    check(engine, case_of(EVERYTHING, flag), config)


@pytest.mark.thinned(10)
@pytest.mark.parametrize(("index", "pair"), list(enumerate(itertools.combinations(FLAGS, 2))))
def test_every_pair(engine: Engine, index: int, pair: tuple[str, str]) -> None:
    base = replace(EVERYTHING, seed=index) if index % 2 else Case(seed=index)
    check(engine, case_of(base, *pair), list(CONFIGS.values())[index % 4])


@pytest.mark.thinned(2)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_all_at_once_in_every_type(engine: Engine, dtype: torch.dtype, config: Config) -> None:
    check(engine, replace(case_of(EVERYTHING, *FLAGS), dtype=dtype), config)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_zoneout_in_evaluation(engine: Engine, config: Config) -> None:
    check(engine, replace(EVERYTHING, cell=Cell(zoneout_h=chance(0.3), zoneout_c=chance(0.4))), config)


def test_layer_norm_of_units_with_a_large_mean(engine: Engine) -> None:
    """Sums of squares would cancel: the moments of programs are combined about their means."""

    class Shifted(Case):
        def tensors(self) -> dict[str, Tensor | None]:
            given = super().tensors()
            given["w_hh"] = given["w_hh"] + 30.0  # all gates shift by 30 times the sum of h
            return given

    check(engine, Shifted(norm=True), CONFIGS["mailbox"])


@pytest.mark.parametrize("without", ["coupled_gates", "layer_norm"])
def test_gradcheck(without: str) -> None:
    """All others at once, but for the gradient clip, whose gradient is none."""
    flags = [flag for flag in FLAGS if flag not in ("recurrent_grad_clip", without)]
    case = case_of(Case(seq_len=3, batch=2, input_size=2, hidden_size=3, reset=True, dtype=torch.float64), *flags)
    config = Config("local", "none", True, False, 1, 16, 16, 16, 4)
    given = {name: t for name, t in case.tensors().items() if t is not None}
    leaves = {n: t.requires_grad_() for n, t in given.items() if t.is_floating_point() and not n.startswith("d")}
    plan = f"{config.encode()}|{backward_of(config).encode()}"

    def layer(*values: Tensor):
        return torch.ops.lstm_triton.layer(*arguments(case, dict(zip(leaves, values)), plan=plan))[:3]

    assert torch.autograd.gradcheck(layer, list(leaves.values()), fast_mode=True)


def test_opcheck() -> None:
    case = case_of(Case(seq_len=2, batch=2), *FLAGS)
    given = {name: t for name, t in case.tensors().items() if t is not None}
    leaves = {
        n: t.float().requires_grad_() for n, t in given.items() if t.is_floating_point() and not n.startswith("d")
    }
    torch.library.opcheck(torch.ops.lstm_triton.layer.default, arguments(case, leaves))


# --- masks


def test_philox_known_answers() -> None:
    """Of Random123's test file kat_vectors, philox4x32 with 10 rounds."""
    zero, ones = torch.tensor([0]), torch.tensor([0xFFFFFFFF])
    assert [int(word) for word in philox.philox(zero, (zero,) * 4)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    found = philox.philox(torch.tensor([-1]), (ones,) * 4)
    assert [int(word) for word in found] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_statistics_of_the_masks(p: float) -> None:
    """Frequency, and independence between units, rows, steps, kinds and seeds: within five standard deviations."""
    time = torch.arange(20).view(-1, 1, 1).expand(-1, 2, 30)
    masks = torch.stack([philox.happens(bits, chance(p)) for bits in philox.step_bits(torch.tensor([7, 7]), time, 40)])
    drawn = masks.double() - p
    deviation = (p * (1 - p)) ** 0.5
    for axes in ([1, 2, 3, 4], [2, 3, 4], [1, 3, 4], [1, 2, 4], [1, 2, 3], [0, 2, 3, 4]):
        count = torch.tensor([masks.shape[axis] for axis in axes]).prod()
        assert (drawn.mean(axes).abs() < 5 * deviation / count**0.5).all()
    for axis in range(masks.dim()):
        pairs = drawn.narrow(axis, 1, masks.shape[axis] - 1) * drawn.narrow(axis, 0, masks.shape[axis] - 1)
        assert pairs.mean().abs() < 5 * deviation**2 / pairs.numel() ** 0.5
    row = philox.sequence_mask(torch.tensor([7]), 50, 400, philox.INPUT, chance(p), torch.float64)
    other = philox.sequence_mask(torch.tensor([7]), 50, 400, philox.RECURRENT, chance(p), torch.float64)
    assert not torch.equal(row, other)
    for mask in (row, other):
        assert set(mask.unique().tolist()) == {0.0, mask.max().item()}
        assert abs(mask.mean() - 1) < 5 * (p / (1 - p) / mask.numel()) ** 0.5


def modules(like: dict, **changes) -> tuple[LSTM, LSTM]:
    torch.manual_seed(0)
    module = LSTM(6, 10, backend="triton", **(like | changes))
    plain = LSTM(6, 10, backend="triton", **like)
    plain.load_state_dict(module.state_dict(), strict=not module.variant.peephole)
    return module, plain


@pytest.mark.parametrize(
    "dropouts", [dict(recurrent_dropout=0.4), dict(variational_dropout=0.3), dict(weight_dropout=0.5)]
)
def test_dropouts_are_off_in_evaluation(dropouts: dict) -> None:
    module, plain = modules({"num_layers": 2, "bidirectional": True}, **dropouts)
    x = torch.randn(4, 3, 6)
    assert not torch.equal(module(x)[0], plain(x)[0])
    assert not torch.equal(module(x)[0], module(x)[0])  # drawn anew for every call
    torch.manual_seed(5)
    first = module(x)[0]
    torch.manual_seed(5)
    assert torch.equal(first, module(x)[0])
    assert torch.equal(module.eval()(x)[0], plain.eval()(x)[0])


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_evaluation_is_the_expectation(backend: str) -> None:
    """One step of 3,000 equal rows: the mean over their masks, within five standard errors."""
    torch.manual_seed(0)
    module = LSTM(4, 5, zoneout=(0.3, 0.2), backend=backend)
    x, state = torch.randn(1, 1, 4).expand(1, 3000, 4), [torch.randn(1, 1, 5).expand(1, 3000, 5) for _ in range(2)]
    _, drawn = module(x, state)
    _, mean = module.eval()(x[:, :1], [tensor[:, :1] for tensor in state])
    plain = LSTM(4, 5, backend=backend)
    plain.load_state_dict(module.state_dict())
    _, new = plain(x[:, :1], [tensor[:, :1] for tensor in state])
    for rows, want, made, old, p in zip(drawn, mean, new, state, (0.3, 0.2)):
        torch.testing.assert_close(want, p * old[:, :1] + (1 - p) * made)
        spread = (made - old[:, :1]).abs() * (p * (1 - p) / 3000) ** 0.5
        assert ((rows.mean(1, keepdim=True) - want).abs() <= 5 * spread + 1e-6).all()


def test_variational_dropout_drops_the_same_all_along_a_sequence() -> None:
    """With W_hh = 0 a dropped input stays dropped: equal inputs give equal gates at every step."""
    module = LSTM(3, 8, variational_dropout=(0.5, 0.0), backend="triton")
    nn.init.zeros_(module.weight_hh_l0)
    _, _, states = module(torch.ones(6, 40, 3), return_states=["gates"])
    gates = states.gates[0]
    assert torch.equal(gates, gates[:1].expand_as(gates))
    assert len(gates[0].flatten(1).unique(dim=0)) == 8  # all subsets of three inputs


def test_weight_dropout_is_of_the_recurrent_weights() -> None:
    module, plain = modules({}, weight_dropout=0.5)
    x = torch.randn(1, 3, 6)
    assert torch.equal(module(x)[0], plain(x)[0])  # the first step, from zeros, reads none of W_hh
    grads = torch.autograd.grad(module(torch.randn(5, 3, 6))[0].sum(), module.weight_hh_l0)[0]
    assert 0.3 < (grads == 0).float().mean() < 0.7


def test_memory_modes_draw_the_same_masks() -> None:
    results = []
    variant = dict(peephole=True, layer_norm=True, zoneout=(0.2, 0.2), recurrent_dropout=0.3, variational_dropout=0.3)
    for recompute in ("none", "gates", "chunk:2"):
        torch.manual_seed(3)
        module = LSTM(6, 10, bidirectional=True, backend="triton", recompute=recompute, cell_clip=0.6, **variant)
        x = torch.randn(5, 3, 6, requires_grad=True)
        lengths, reset = torch.tensor([5, 2, 4]), torch.rand(5, 3) < 0.3
        out, (h_n, c_n) = module(x, lengths=lengths, reset=reset)
        leaves = [x, *module.parameters()]
        results.append([out, h_n, c_n, *torch.autograd.grad(out.sum() + (h_n * c_n).sum(), leaves)])
    for other in results[1:]:
        for a, b in zip(results[0], other):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


# --- the textbook, once more by hand


def test_peephole_layer_norm_coupled_and_clip_by_hand() -> None:
    """Two steps in plain arithmetic, from the papers' formulas and the module's parameters by name."""
    torch.manual_seed(1)
    module = LSTM(3, 4, peephole=True, layer_norm=True, coupled_gates=True, cell_clip=0.4, backend="triton")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    x = torch.randn(2, 1, 3)

    def normal(z: Tensor) -> Tensor:
        return (z - z.mean()) / (z.var(unbiased=False) + 1e-5).sqrt()

    h = c = torch.zeros(4)
    w_ci, w_co = module.weight_ch_l0.chunk(2)
    for x_t in x[:, 0]:
        a = module.gain_ih_l0 * normal(module.weight_ih_l0 @ x_t) + module.bias_ih_l0
        a = a + module.gain_hh_l0 * normal(module.weight_hh_l0 @ h) + module.bias_hh_l0
        a_i, a_g, a_o = a.chunk(3)
        i = torch.sigmoid(a_i + w_ci * c)
        c = ((1 - i) * c + i * torch.tanh(a_g)).clamp(-0.4, 0.4)
        o = torch.sigmoid(a_o + w_co * c)
        h = o * torch.tanh(module.gain_c_l0 * normal(c) + module.bias_c_l0)
    _, (h_n, c_n) = module(x)
    torch.testing.assert_close(h_n[0, 0], h, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(c_n[0, 0], c, atol=1e-5, rtol=1e-4)


# --- the module


@pytest.mark.parametrize(
    ("variant", "names"),
    [
        (dict(peephole=True), {"weight_ch": 3}),
        (dict(peephole="o"), {"weight_ch": 1}),
        (dict(peephole=True, coupled_gates=True), {"weight_ch": 2}),
        (dict(layer_norm=True), {"gain_ih": 4, "gain_hh": 4, "gain_c": 1, "bias_c": 1}),
        (dict(layer_norm=True, bias=False), {"gain_ih": 4, "gain_hh": 4, "gain_c": 1}),
        (dict(layer_norm=True, coupled_gates=True), {"gain_ih": 3, "gain_hh": 3, "gain_c": 1, "bias_c": 1}),
        (dict(zoneout=(0.1, 0.1), weight_dropout=0.5, cell_clip=3), {}),
    ],
)
def test_names_and_shapes_of_parameters(variant: dict, names: dict[str, int]) -> None:
    sizes = dict(num_layers=2, bidirectional=True, bias=variant.pop("bias", True))
    torch.manual_seed(0)
    theirs = nn.LSTM(3, 5, **sizes)
    torch.manual_seed(0)
    module = LSTM(3, 5, **sizes, **variant)
    suffixes = ("_l0", "_l0_reverse", "_l1", "_l1_reverse")
    own = {name + suffix: (rows * 5,) for name, rows in names.items() for suffix in suffixes}
    state = module.state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items() if name not in theirs.state_dict()} == own
    rows = 15 if variant.get("coupled_gates") else 20
    assert all(state[name].shape == (rows, *tensor.shape[1:]) for name, tensor in theirs.state_dict().items())
    assert all((tensor == 1).all() for name, tensor in state.items() if name.startswith("gain"))
    assert all((tensor == 0).all() for name, tensor in state.items() if name.startswith("bias_c"))
    for a, b in zip(module(torch.randn(4, 2, 3))[1], (5, 5)):
        assert a.shape == (4, 2, b)


def test_plain_state_dicts_go_both_ways() -> None:
    theirs = nn.LSTM(3, 5, num_layers=2)
    ours = LSTM(3, 5, num_layers=2, zoneout=(0.1, 0.2), recurrent_dropout=0.1, cell_clip=2.0)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    missing = LSTM(3, 5, num_layers=2, peephole=True).load_state_dict(theirs.state_dict(), strict=False)
    assert missing.missing_keys == ["weight_ch_l0", "weight_ch_l1"]
    assert not missing.unexpected_keys


def test_forget_bias() -> None:
    module = LSTM(3, 5, num_layers=2, forget_bias=1.5)
    for layer in range(2):
        total = getattr(module, f"bias_ih_l{layer}") + getattr(module, f"bias_hh_l{layer}")
        assert torch.equal(total.chunk(4)[1], torch.full((5,), 1.5))
        assert total.chunk(4)[0].unique().numel() == 5


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_learned_initial_state(backend: str) -> None:
    """Without hx, and after a reset without reset_state; an explicit one of either wins."""
    module = LSTM(3, 5, bidirectional=True, learn_initial_state=True, backend=backend)
    assert {"initial_h", "initial_c"} <= module.state_dict().keys()
    with torch.no_grad():
        module.initial_h.normal_()
        module.initial_c.normal_()
    x, reset = torch.randn(4, 2, 3), torch.zeros(4, 2, dtype=torch.bool)
    reset[2, 0] = True
    pair = tuple(tensor.unsqueeze(1).repeat(1, 2, 1) for tensor in (module.initial_h, module.initial_c))
    same = {"reset": reset, "reset_state": (module.initial_h, module.initial_c)}
    torch.testing.assert_close(module(x)[0], module(x, pair)[0])
    torch.testing.assert_close(module(x, reset=reset)[0], module(x, pair, **same)[0])
    torch.testing.assert_close(module(x[:, 0])[0], module(x)[0][:, 0])
    packed = nn.utils.rnn.pack_sequence([x[:, 0], x[:2, 1]])
    torch.testing.assert_close(module(packed)[0].data, module(packed, pair)[0].data)
    zeros = tuple(torch.zeros_like(tensor) for tensor in pair)
    assert not torch.allclose(module(x, zeros)[0], module(x)[0])
    module(x, reset=reset)[0].sum().backward()
    assert module.initial_h.grad.abs().sum() > 0
    assert module.initial_c.grad.abs().sum() > 0


@pytest.mark.parametrize("proj_size", [0, 3])
def test_projections_and_layers(proj_size: int) -> None:
    """The kernels against PyTorch's path, with what projections go with."""
    variant = dict(peephole=True, zoneout=(0.0, 0.2), recurrent_dropout=0.2, cell_clip=0.5, weight_dropout=0.2)
    results = []
    for backend in ("triton", "torch"):
        torch.manual_seed(0)
        module = LSTM(4, 6, num_layers=2, bidirectional=True, proj_size=proj_size, backend=backend, **variant)
        x, reset = torch.randn(5, 3, 4), torch.rand(5, 3) < 0.3
        torch.manual_seed(1)
        out, state = module(x, reset=reset)
        results.append([out, *state, *torch.autograd.grad(out.square().sum(), module.parameters())])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "variant",
    [dict(peephole=True, zoneout=(0.1, 0.1)), dict(layer_norm=True, coupled_gates=True), dict(cell_clip=0.2)],
    ids=str,
)
def test_export_of_variants(variant: dict) -> None:
    module = LSTM(4, 5, bidirectional=True, batch_first=True, **variant).eval()
    shapes = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    with torch.no_grad():
        program = torch.export.export(module, (torch.randn(3, 5, 4),), dynamic_shapes=shapes)
        plain = program.run_decompositions(lstm_triton.decompositions())
        x = torch.randn(2, 7, 4)
        for one in (program, plain):
            torch.testing.assert_close(one.module()(x)[0], module(x)[0])


def test_compile_with_masks() -> None:
    """One graph, whatever B and T; new masks at every call."""
    module = LSTM(4, 5, zoneout=(0.2, 0.2), variational_dropout=0.3, peephole=True, backend="triton")
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((5, 3, 4), (6, 2, 4)):
        x = torch.randn(shape)
        out = compiled(x)[0]
        assert not torch.equal(out, compiled(x)[0])
        out.sum().backward()


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_an_ensemble_in_one_launch(randomness: str) -> None:
    """Members share the masks or do not, as vmap is told; without masks they are what each is alone."""
    members = [
        LSTM(4, 6, peephole=True, layer_norm=True, variational_dropout=0.4, zoneout=(0.3, 0.0), backend="triton")
        for _ in range(3)
    ]
    same = {name: tensor.detach() for name, tensor in members[0].named_parameters()}
    stacked = {name: tensor.expand(3, *tensor.shape) for name, tensor in same.items()}
    x = torch.randn(5, 2, 4)

    def call(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(members[0], weights, (x,))[0]

    out = torch.func.vmap(call, randomness=randomness)(stacked)
    assert torch.allclose(out[0], out[1], atol=1e-6) == (randomness == "same")
    members[0].eval()
    torch.testing.assert_close(torch.func.vmap(call)(stacked)[2], members[0](x)[0])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(zoneout=(1.0, 0.0)), ValueError, r"zoneout should be a probability in \[0, 1\)"),
        (dict(zoneout=(-0.1, 0.0)), ValueError, "zoneout"),
        (dict(zoneout=0.1), TypeError, "pair"),
        (dict(zoneout=(0.1,)), ValueError, "pair"),
        (dict(zoneout=(0.1, "x")), TypeError, "zoneout should be a number"),
        (dict(recurrent_dropout=1), ValueError, "recurrent_dropout"),
        (dict(recurrent_dropout=float("nan")), ValueError, "recurrent_dropout"),
        (dict(variational_dropout=(0.1, 1.5)), ValueError, "variational_dropout"),
        (dict(weight_dropout=True), TypeError, "weight_dropout"),
        (dict(cell_clip=0), ValueError, "cell_clip should be a positive number"),
        (dict(cell_clip="3"), TypeError, "cell_clip"),
        (dict(recurrent_grad_clip=float("inf")), ValueError, "recurrent_grad_clip"),
        (dict(peephole="x"), ValueError, "gates among 'ifo'"),
        (dict(peephole="ii"), ValueError, "each once"),
        (dict(peephole=1), TypeError, "peephole"),
        (dict(layer_norm=1), TypeError, "layer_norm"),
        (dict(coupled_gates=True, peephole="ifo"), ValueError, "no forget gate of their own"),
        (dict(coupled_gates=True, forget_bias=1.0), ValueError, "no forget gate of their own"),
        (dict(bias=False, forget_bias=1.0), ValueError, "bias=False"),
        (dict(forget_bias="1"), TypeError, "forget_bias"),
        (dict(forget_bias=float("nan")), ValueError, "forget_bias should be finite"),
        (dict(learn_initial_state=1), TypeError, "learn_initial_state"),
        (dict(proj_size=2, layer_norm=True), ValueError, "layer_norm is not supported with proj_size"),
        (dict(proj_size=2, zoneout=(0.1, 0.0)), ValueError, "zoneout of h"),
        (dict(proj_size=2, variational_dropout=0.1), ValueError, "variational_dropout of h"),
    ],
    ids=str,
)
def test_what_cannot_be_is_an_error_at_construction(arguments: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        LSTM(3, 5, **arguments)


def test_a_cell_takes_no_variants() -> None:
    with pytest.raises(TypeError, match="LSTMCell computes the plain cell: peephole, zoneout go with LSTM"):
        LSTMCell(3, 5, peephole=True, zoneout=(0.1, 0.1))
    with pytest.raises(TypeError, match="learn_initial_state go with LSTM"):
        LSTMCell(3, 5, learn_initial_state=True)
    with pytest.raises(TypeError, match="variant should be a Variant, got dict"):
        functional.lstm(torch.randn(2, 2, 3), None, [], variant={"peephole": True})


def test_weights_of_the_wrong_shape() -> None:
    weights = [torch.randn(20, 3), torch.randn(20, 5), torch.randn(12)]
    with pytest.raises(RuntimeError, match=r"Expected weight_ch of size \(15,\), got \(12,\)"):
        functional.lstm(torch.randn(4, 2, 3), None, weights, bias=False, variant=Variant(peephole=True))


def test_repr_and_defaults_tell_variants() -> None:
    assert "zoneout=(0.1, 0.0), coupled_gates=True, learn_initial_state=True" in repr(
        LSTM(3, 5, zoneout=(0.1, 0.0), coupled_gates=True, learn_initial_state=True)
    )
    assert repr(LSTM(3, 5)) == "LSTM(3, 5)"
    assert Cell.decode(Cell(coupled_gates=True, cell_clip=0.1).encode()) == Cell(coupled_gates=True, cell_clip=0.1)


@pytest.mark.parametrize("recompute", ["none", "gates", "chunk:2"])
def test_autocast_does_not_reach_into_the_operators(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's casts layer_norm to float32, the CPU's does not: here it does as well."""
    layer_norm = torch.nn.functional.layer_norm

    def as_on_cuda(z: Tensor, *arguments) -> Tensor:
        return layer_norm(z.float() if torch.is_autocast_enabled("cpu") else z, *arguments)

    monkeypatch.setattr(torch.nn.functional, "layer_norm", as_on_cuda)
    for backend in ("triton", "torch"):
        module = LSTM(3, 17, layer_norm=True, peephole=True, recompute=recompute, backend=backend)
        with torch.autocast("cpu", dtype=torch.float16):
            out, (_, c_n) = module(torch.randn(4, 2, 3))
            out.sum().backward()
        assert out.dtype == c_n.dtype == torch.float16
        assert module.gain_hh_l0.grad.dtype == torch.float32


def test_unpatch_leaves_what_is_beyond_nn_lstm() -> None:
    model = nn.ModuleDict({"a": LSTM(3, 5, peephole=True), "b": LSTM(3, 5, learn_initial_state=True), "c": LSTM(3, 5)})
    changes = {change.name: change.left for change in lstm_triton.unpatch(model)}
    assert changes == {"a": "nn.LSTM has no peephole", "b": "nn.LSTM has no learn_initial_state", "c": ""}
    assert [type(module) for module in model.values()] == [LSTM, LSTM, nn.LSTM]


def test_a_sequence_can_be_cut_under_zoneout() -> None:
    """h is kept as it is stored, so that a call can go on from h_n."""
    module = LSTM(3, 17, batch_invariant=True, zoneout=(0.5, 0.2), backend="triton").half().eval()
    x = torch.randn(6, 3, 3).half()
    whole, first = module(x)[0], module(x[:3])
    assert torch.equal(whole, torch.cat((first[0], module(x[3:], first[1])[0])))


def test_no_second_derivative_of_the_gradient_clip() -> None:
    module, x = LSTM(3, 5, recurrent_grad_clip=0.1, backend="triton"), torch.randn(4, 2, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="recurrent_grad_clip has no second derivative"):
        torch.autograd.grad(module(x)[0].sum(), x, create_graph=True)


def test_learned_state_with_wrong_input_and_export() -> None:
    module = LSTM(3, 5, learn_initial_state=True)
    with pytest.raises(ValueError, match="Expected input to be 2D or 3D, got 1D"):
        module(torch.randn(3))
    with torch.no_grad():
        program = torch.export.export(module, (torch.randn(4, 2, 3),))
        plain = program.run_decompositions(lstm_triton.decompositions())
        x = torch.randn(4, 2, 3)
        torch.testing.assert_close(plain.module()(x)[0], module(x)[0])
