"""The LSTM cell on tiles: the only place in the kernels where its maths is written.

Gate order is PyTorch's: input i, forget f, candidate g, output o. Every tile is in the compute
type (fp32, or fp64 under the interpreter) and of one shape; the functions do not care which.
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    # exp overflows to inf for x < -88 and 1 / inf is the right answer: safe for every x.
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def tanh(x):
    # On |x| the exponential lies in (0, 1]: nothing overflows, and the quotient rounds closer
    # than 2 sigmoid(2x) - 1. On x itself it would be inf / inf below about -44.
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -t, t)


@triton.jit
def lstm_forward_step(a_i, a_f, a_g, a_o, c_prev):
    """Pre-activations and c_{t-1} -> activated gates i, f, g, o and the new c_t, h_t."""
    i = sigmoid(a_i)
    f = sigmoid(a_f)
    g = tanh(a_g)
    o = sigmoid(a_o)
    c = f * c_prev + i * g
    h = o * tanh(c)
    return i, f, g, o, c, h


@triton.jit
def lstm_backward_step(i, f, g, o, c, c_prev, dh, dc):
    """Gradients of h_t and c_t -> those of the four activated gates and of c_{t-1}."""
    tanh_c = tanh(c)
    dc = dc + dh * o * (1.0 - tanh_c * tanh_c)
    return dc * g, dc * c_prev, dc * i, dh * tanh_c, dc * f


@triton.jit
def lstm_gates_backward(i, f, g, o, d_i, d_f, d_g, d_o):
    """Gradients of the activated gates -> those of the pre-activations."""
    return d_i * i * (1.0 - i), d_f * f * (1.0 - f), d_g * (1.0 - g * g), d_o * o * (1.0 - o)
