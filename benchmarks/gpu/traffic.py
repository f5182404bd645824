"""What an operation cannot do without: the bytes that it must move, every input read once, every output written once,
and the floating-point operations of its matrix products.

B images, N tokens of C = H d channels, M = N - r after the merge; ``e`` bytes an element; sizes, similarities and
indices are 4 bytes each, a count and a span 8. Where images begin is next to nothing.
"""


def match_bytes(B: int, N: int, C: int, e: int) -> int:
    """Keys; similarity and partner; counts."""
    return B * N * C * e + B * N * 8 + B * 8


def assign_bytes(B: int, N: int, M: int) -> int:
    """Similarity and partner, r; slots and tokens; spans."""
    return B * N * 16 + B * M * 8 + B * 8


def unmerge_bytes(B: int, N: int, M: int, C: int, e: int) -> int:
    """Merged x and the slots; x of the tokens."""
    return B * (N + M) * C * e + B * N * 4


def merge_bytes(B: int, N: int, M: int, C: int, e: int) -> int:
    """x, sizes, tokens, spans; merged x, its sizes and their log2."""
    return B * (N + M) * C * e + B * N * 8 + B * M * 16


def add_merge_norm_bytes(B: int, N: int, M: int, C: int, e: int) -> int:
    """As merge, with the attended tokens read and the normed ones written."""
    return merge_bytes(B, N, M, C, e) + B * (N + M) * C * e


def add_norm_bytes(B: int, N: int, C: int, e: int) -> int:
    """x and the attended tokens; their sum and its norm."""
    return 4 * B * N * C * e


def attention_bytes(B: int, N: int, C: int, e: int) -> int:
    """q, k, v and log2 of the sizes; what comes out."""
    return 4 * B * N * C * e + B * N * 4


def linear_gelu_bytes(T: int, K: int, N: int, e: int) -> int:
    """Rows, weight and bias; the hidden layer."""
    return (T * (K + N) + N * (K + 1)) * e


def match_flops(B: int, N: int, C: int) -> int:
    """Every token of A with every token of B."""
    return 2 * B * (N // 2) * (N - N // 2) * C


def attention_flops(B: int, N: int, C: int) -> int:
    """q k^T, and the probabilities with v."""
    return 4 * B * N * N * C


def linear_gelu_flops(T: int, K: int, N: int) -> int:
    return 2 * T * K * N
