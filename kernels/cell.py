"""The LSTM cell on tiles, with its variants: the only place in the kernels where its maths is written.

Gate order is PyTorch's: input i, forget f, candidate g, output o. Every tile is in the compute
type (fp32, or fp64 under the interpreter) and of one shape; the functions do not care which.

What a variant adds stands behind an argument that is None (or False) without it, and then leaves nothing in the
binary: the peephole weights of each unit; DROPOUT, with g_scale, the mask on the candidate; ZONEOUT; scalars; COUPLED,
f = 1 - i. A layer-normalised cell (NORM) hands in what `norm.py` has made of its pre-activations, and normalises c_t
before `lstm_output`. EXACT: of fp32 data whose products keep fp32's precision, for which the approximations that are
good enough elsewhere would be most of the error. `lstm_triton.reference` states the same in
plain PyTorch, with sources.
"""

import triton
import triton.language as tl

from .records import Gates

LOG2_E = tl.constexpr(1.4426950216293335)  # in fp32
LOG2_E_REST = tl.constexpr(1.92596298909109e-08)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.constexpr_function
def has_ptx():
    """Whether the kernel becomes PTX: not in the interpreter, nor on AMD."""
    return not triton.knobs.runtime.interpret and tl.target_info.is_cuda()


@triton.constexpr_function
def has_gcn():
    """Whether it becomes AMD's machine code."""
    return not triton.knobs.runtime.interpret and tl.target_info.is_hip()


@triton.jit
def rounded_product(a, b):
    """a * b, rounded before anything is added to it.

    The compiler fuses a plain product with a sum that it goes into. Of two lanes that add their products up, each would
    then round only the other's; and of a difference from the rounded product the rounding itself would be left.
    """
    if has_ptx() and a.dtype == tl.float32:
        # What has an explicit .rn is never contracted (PTX manual).
        asm: tl.constexpr = "mul.rn.f32 $0, $1, $2;"
        return tl.inline_asm_elementwise(asm, "=r,r,r", [a, b], dtype=tl.float32, is_pure=True, pack=1)
    elif has_gcn() and a.dtype == tl.float32:
        # LLVM does not look into it.
        asm: tl.constexpr = "v_mul_f32 $0, $1, $2"
        return tl.inline_asm_elementwise(asm, "=v,v,v", [a, b], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return a * b


@triton.jit
def approximate(x, name: tl.constexpr):
    """One of the special functions of NVIDIA's GPUs, "ex2" or "rcp", with subnormal results flushed to zero."""
    asm: tl.constexpr = name + ".approx.ftz.f32 $0, $1;"
    return tl.inline_asm_elementwise(asm, "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def exp(x, EXACT: tl.constexpr):
    if has_ptx() and x.dtype == tl.float32:
        # Triton's own exp spends half of its instructions on subnormal results.
        y = rounded_product(x, LOG2_E)
        e = approximate(y, "ex2")
        if EXACT:
            # What rounding took from the exponent; where nothing is left of e, it may be no number.
            lost = tl.fma(x, LOG2_E, -y) + x * LOG2_E_REST
            e = tl.where((e > 0) & (e < float("inf")), tl.fma(e, lost * LN_2, e), e)
        return e
    else:
        return tl.exp(x)


@triton.jit
def quotient(a, b, EXACT: tl.constexpr):
    if has_ptx() and b.dtype == tl.float32:
        # Without a division's care for extreme operands; rcp is within one unit in the last place (PTX manual).
        r = approximate(b, "rcp")
        if EXACT:
            r = tl.where(b < float("inf"), tl.fma(tl.fma(-b, r, 1.0), r, r), r)  # Newton's step
        return a * r
    else:
        return a / b


@triton.jit
def sigmoid(x, EXACT: tl.constexpr):
    # exp overflows to inf for x < -88 and 1 / inf is the right answer: safe for every x.
    return quotient(1.0, 1.0 + exp(-x, EXACT), EXACT)


@triton.jit
def tanh(x, EXACT: tl.constexpr):
    # On |x| the exponential lies in (0, 1]: nothing overflows, and the quotient rounds closer
    # than 2 sigmoid(2x) - 1. On x itself it would be inf / inf below about -44.
    e = exp(-2.0 * tl.abs(x), EXACT)
    t = quotient(1.0 - e, 1.0 + e, EXACT)
    if EXACT and has_ptx():
        # Near 1 only the last rounding is left this way, which a gradient through 1 - t * t multiplies.
        t = tl.where(e < 0.25, tl.fma(-2.0 * e, quotient(1.0, 1.0 + e, EXACT), 1.0), t)
    return tl.where(x < 0, -t, t)


@triton.jit
def clipped(x, bound):
    """x within +-bound; a NaN stays one."""
    if bound is None:
        return x
    else:
        return tl.where(x > bound, bound, tl.where(x < -bound, -bound, x))


@triton.jit
def next_cell(gates, c_prev, g_scale, how: tl.constexpr):
    """c_t, before it is clipped."""
    g = gates.g
    if how.DROPOUT:
        g = g * g_scale
    if how.NORM:
        # The backward pass subtracts the forward pass's mean from it: the same product is fused in both.
        return tl.fma(gates.f, c_prev, gates.i * g)
    else:
        return gates.f * c_prev + gates.i * g


@triton.jit
def lstm_forward_step(a, c_prev, peephole, g_scale, scalars, how: tl.constexpr):
    """Pre-activations of the gates and c_{t-1} -> activated gates and the new c_t."""
    a_i, a_f, a_o = a.i, a.f, a.o
    if peephole.i is not None:
        a_i += peephole.i * c_prev
        a_f += peephole.f * c_prev
    i = sigmoid(a_i, how.EXACT)
    f = 1.0 - i if how.COUPLED else sigmoid(a_f, how.EXACT)
    g = tanh(a.g, how.EXACT)
    c = clipped(next_cell(Gates(i, f, g, None), c_prev, g_scale, how), scalars.cell_clip)
    if peephole.o is not None:
        a_o += peephole.o * c
    return Gates(i, f, g, sigmoid(a_o, how.EXACT)), c


@triton.jit
def lstm_output(o, c, EXACT: tl.constexpr):
    """h_t of the output gate and c_t, or what layer normalisation has made of c_t."""
    return o * tanh(c, EXACT)


@triton.jit
def lstm_output_backward(o, c, dh, EXACT: tl.constexpr):
    """Gradient of h_t -> those of the activated output gate and of c as `lstm_output` took it."""
    tanh_c = tanh(c, EXACT)
    return dh * tanh_c, dh * o * (1.0 - tanh_c * tanh_c)


@triton.jit
def lstm_backward_step(gates, cells, d, dc, peephole, g_scale, scalars, how: tl.constexpr):
    """Gradients of the activated gates and of c_t -> those of the four pre-activations and of c_{t-1}.

    d: of o the whole gradient; of i, f and g only what the caller was given for the kept gates themselves (None for
    nothing), to which the gradient through c_t is added here.
    """
    i, f, g, o = gates.i, gates.f, gates.g, gates.o
    da_o = clipped(d.o * o * (1.0 - o), scalars.recurrent_grad_clip)
    if peephole.o is not None:
        dc += da_o * peephole.o
    if scalars.cell_clip is not None:
        dc = tl.where(tl.abs(cells.raw) <= scalars.cell_clip, dc, 0.0)
    through_i, through_f, through_g = dc * g, dc * cells.prev, dc * i
    if how.DROPOUT:
        through_i, through_g = through_i * g_scale, through_g * g_scale
    if d.i is not None:
        through_i, through_f, through_g = through_i + d.i, through_f + d.f, through_g + d.g
    if how.COUPLED:
        through_i -= through_f
    da_i = clipped(through_i * i * (1.0 - i), scalars.recurrent_grad_clip)
    da_f = tl.zeros_like(f) if how.COUPLED else clipped(through_f * f * (1.0 - f), scalars.recurrent_grad_clip)
    da_g = clipped(through_g * (1.0 - g * g), scalars.recurrent_grad_clip)
    dc_prev = dc * f
    if peephole.i is not None:
        dc_prev += da_i * peephole.i + da_f * peephole.f
    return Gates(da_i, da_f, da_g, da_o), dc_prev


@triton.jit
def zoneout(new, old, keep, ZONEOUT: tl.constexpr, SAMPLED: tl.constexpr):
    """A state that keeps its old value where `keep` (bool) says so; or the mean of that, keep being the probability."""
    if not ZONEOUT:
        return new
    elif SAMPLED:
        return tl.where(keep, old, new)
    else:
        return keep * old + (1.0 - keep) * new


@triton.jit
def zoneout_backward(d, keep, ZONEOUT: tl.constexpr, SAMPLED: tl.constexpr):
    """Gradient of what `zoneout` gave -> those of the new and of the old state."""
    if not ZONEOUT:
        return d, tl.zeros_like(d)
    elif SAMPLED:
        return tl.where(keep, 0.0, d), tl.where(keep, d, 0.0)
    else:
        return (1.0 - keep) * d, keep * d
