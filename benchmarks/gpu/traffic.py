"""The least that an operation needs: bytes (each input read once, each output written once) and FLOPs of its products.

B images have N tokens of C = H d channels, and M = N - r after the merge. An element has ``e`` bytes; sizes,
similarities and indices have 4 bytes each, a count and a span 8. The offsets of images are negligible.
"""


def match_bytes(B: int, N: int, C: int, e: int) -> int:
    """Reads keys; writes similarity, partner and counts."""
    return B * N * C * e + B * N * 8 + B * 8


def assign_bytes(B: int, N: int, M: int) -> int:
    """Reads similarity, partner and r; writes slots, tokens and spans."""
    return B * N * 16 + B * M * 8 + B * 8


def unmerge_bytes(B: int, N: int, M: int, C: int, e: int) -> int:
    """Reads merged x and slots; writes x of all tokens."""
    return B * (N + M) * C * e + B * N * 4


def merge_bytes(B: int, N: int, M: int, C: int, e: int) -> int:
    """Reads x, sizes, tokens and spans; writes merged x, sizes and their log2."""
    return B * (N + M) * C * e + B * N * 8 + B * M * 16


def add_merge_norm_bytes(B: int, N: int, M: int, C: int, e: int) -> int:
    """As merge; also reads the attended tokens and writes the normed ones."""
    return merge_bytes(B, N, M, C, e) + B * (N + M) * C * e


def add_norm_bytes(B: int, N: int, C: int, e: int) -> int:
    """Reads x and the attended tokens; writes their sum and its norm."""
    return 4 * B * N * C * e


def attention_bytes(B: int, N: int, C: int, e: int) -> int:
    """Reads q, k, v and log2 of the sizes; writes the output."""
    return 4 * B * N * C * e + B * N * 4


def linear_gelu_bytes(T: int, K: int, N: int, e: int) -> int:
    """Reads rows, weight and bias; writes the hidden layer."""
    return (T * (K + N) + N * (K + 1)) * e


def match_flops(B: int, N: int, C: int) -> int:
    """The products of every token of A with every token of B."""
    return 2 * B * (N // 2) * (N - N // 2) * C


def attention_flops(B: int, N: int, C: int) -> int:
    """q k^T, and the product of the probabilities with v."""
    return 4 * B * N * N * C


def linear_gelu_flops(T: int, K: int, N: int) -> int:
    return 2 * T * K * N
