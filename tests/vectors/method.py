"""The method in numpy: element types and rounding, lookup, gradient, head, merge, several adapters. Ids in comments are
clauses of SPEC.md. What a case holds, README.md says."""
import collections, functools  # noqa: E401
import numpy as np

Tensor = collections.namedtuple("Tensor", "dtype bits")  # bits: a matrix of unsigned integers (R5)
BITS = {"F64": "<u8", "F32": "<u4", "BF16": "<u2", "F16": "<u2"}  # R1, R11; in the order of F16
COMPUTE = {"F64": np.float64, "F32": np.float32, "BF16": np.float32, "F16": np.float32}  # R2

# ---- R: element types and rounding. *Values* are in the compute type; COMPUTE[dtype] rounds a scalar (R9).
def widen(t):  # R4: the values of a tensor
    if t.dtype == "BF16":
        return (t.bits.astype("<u4") << 16).view("<f4")
    return t.bits.view(BITS[t.dtype].replace("u", "f")).astype(COMPUTE[t.dtype])
def narrow(values, dtype):  # R3: the tensor of values; R7: F64 goes to a half type by way of F32
    x = np.ascontiguousarray(values, COMPUTE[dtype])
    if dtype != "BF16":
        return Tensor(dtype, x.astype(BITS[dtype].replace("u", "f")).view(BITS[dtype]))
    u = x.view("<u4")
    rounded = (u + np.uint32(0x7FFF) + ((u >> 16) & 1)) >> 16
    return Tensor(dtype, np.where(np.isnan(x), (u >> 16) | 0x40, rounded).astype("<u2"))  # R6
def power(b, n, r=1.0):  # O10
    return r if n == 0 else power(b * b, n // 2, r * b if n % 2 else r)
def convert(t, dtype):  # R5, else R3 or R4
    return t if t.dtype == dtype else narrow(widen(t), dtype)

# ---- T, L, G, H, M, A. An operation gets a case and its tensors, and returns what came out, by name.
def check_ids(ids, vocab_size, distinct):  # refusals are a ValueError of the kind in E1
    for slot, i in enumerate(ids):  # T1, T6
        if not 0 <= i < vocab_size:  # T2, T4, L2, G6
            raise ValueError("TokenOutOfRange")
        if distinct and i in ids[:slot]:  # T5
            raise ValueError("DuplicateToken")
def token_set(case, tensors):
    check_ids([case["vocab_size"]], 2**32, distinct=False)  # T3
    check_ids(case["token_indices"], case["vocab_size"], distinct=True)
    return {}
def merge(case, tensors):
    (dtype, bits), ids = tensors["table"], case["token_indices"]
    check_ids(ids, len(bits), distinct=True)
    kept, merged = bits[ids], bits.copy()  # M1
    merged[ids] = convert(tensors["rows"], dtype).bits  # M2
    unmerged = merged.copy()
    unmerged[ids] = kept  # M3
    return {"merged": Tensor(dtype, merged), "table": Tensor(dtype, unmerged)}

def lookup(case, tensors):
    (dtype, weight), option, ids = merge(case, tensors)["merged"], case["options"], case["input_ids"]
    padding = [option["padding_idx"]] if "padding_idx" in option else []
    check_ids(ids + padding, len(weight), distinct=False)  # L2, G6
    out, c, factor = Tensor(dtype, weight[ids]), COMPUTE[dtype], 1  # L3 to L5
    if "max_norm" in option:  # L7
        n = np.sqrt(np.square(widen(out), dtype="<f8").sum(axis=1, keepdims=True))
        shortened = narrow(widen(out) * c(option["max_norm"] / (n + 1e-7)), dtype)
        out = Tensor(dtype, np.where(n > option["max_norm"], shortened.bits, out.bits))
    for kind, number in option.get("scale", {}).items():  # L9, L10
        factor = {"exact": number, "table_dtype": widen(narrow([number], dtype))[0]}[kind]
        out = narrow(widen(out) * c(factor), dtype)
    if "upstream" not in tensors:
        return {"output": out}
    u, gradient = widen(tensors["upstream"]), np.zeros(weight.shape, c)  # G2, G9
    for p, i in enumerate(ids):
        count = ids.count(i) if option.get("scale_grad_by_freq") else 1
        if i not in padding or option.get("train_padding"):  # G5
            gradient[i] += u[p] * (c(factor) * c(1 / count))  # G3, G4; to multiply by 1 is exact
    return {"output": out, "gradient": narrow(gradient[case["token_indices"]], f"F{8 * u.itemsize}")}  # G1

def several(case, tensors):
    rows, upstream, ids = tensors["rows"], tensors["upstream"], np.array(case["input_ids"])
    owner, token = np.array([(a, i) for a, own in enumerate(case["adapters"]) for i in own]).T  # of stacked rows
    examples = [-1 if a is None else a for a in case.get("choice", [-2])]  # -1: no adapter; -2: all are active
    choice, values = np.repeat(examples, len(ids) // len(examples)), widen(rows)  # A8
    out, gradient = upstream.bits.copy(), np.zeros_like(values)
    for a in set(examples):  # A15, A16: each by itself
        own, at = (owner == a) | (a == -2), choice == a
        union = list(dict.fromkeys(token[own].tolist()))  # A4
        share = np.zeros((len(union), len(token)), COMPUTE[rows.dtype])
        for u, i in enumerate(union):
            s = np.flatnonzero(own & (token == i))
            w = np.array(case["weights"])[owner[s]] if "weights" in case else 1.0 * (s == s[-1])  # A7, A6
            share[u, s] = w / w.max() / sum(w / w.max())
        sums = [functools.reduce(np.add, (p * x for p, x in zip(shares, values) if p)) for shares in share]
        part = {"rows": narrow(np.reshape(sums, (-1, values.shape[1])), f"F{8 * values.itemsize}"),
                "upstream": Tensor(upstream.dtype, upstream.bits[at])}
        got = lookup({**case, "token_indices": union, "input_ids": ids[at].tolist()}, {**tensors, **part})
        out[at], gradient = got["output"].bits, gradient + share.T @ widen(got["gradient"])
    return {"output": Tensor(upstream.dtype, out), "gradient": narrow(gradient, f"F{8 * gradient.itemsize}")}
def head(case, tensors):
    weight, ids = merge(case, tensors)["merged"], case["token_indices"]
    w, h, u = map(widen, (weight, tensors["hidden"], tensors["upstream"]))
    return {"logits": narrow(h @ w.T, weight.dtype), "hidden_gradient": narrow(u @ w, weight.dtype),  # H1, H6
            "gradient": narrow(u[:, ids].T @ h, f"F{8 * u.itemsize}")}  # H7
