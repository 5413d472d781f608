"""Runs the golden vectors of this folder: a port of the method in numpy, written from SPEC.md alone.

Ids in comments are its clauses. Simpler than a library may be: lookup and head follow the dense definition (method.py),
and files are taken to be well formed. Prints a line per failed case, then `N passed, N failed`."""
import collections, functools, hashlib, json, math, pathlib, sys  # noqa: E401
sys.dont_write_bytecode = True
import numpy as np  # noqa: E402
from method import BITS, COMPUTE, Tensor, convert, narrow, power, widen  # noqa: E402
from method import head, lookup, merge, several, token_set  # noqa: E402, F401

HERE = pathlib.Path(__file__).resolve().parent
compact = functools.partial(json.dumps, ensure_ascii=False, separators=(",", ":"))  # D4, C3

# ---- An operation gets a case and its tensors, and returns what came out, by name. O, K:
# R rounds values to the type of the rows, c rounds a scalar (O9), t is the step.
def sgd(w, g, state, t, c, R, lr=0, momentum=0, dampening=0, nesterov=False, weight_decay=0):  # O6, O7
    if weight_decay:
        g = R(g + c(weight_decay) * w)
    if momentum:
        b = R(R(state["momentum_buffer"] * c(momentum)) + c(1 - dampening) * g) if state else g
        state["momentum_buffer"] = b
        g = R(g + c(momentum) * b) if nesterov else b
    return R(w + c(-lr) * g)

def adam(w, g, state, t, c, R, lr=0, beta1=0, beta2=0, eps=0, weight_decay=0, decoupled=False, amsgrad=False):
    m, v, a = (state.get(k, np.zeros_like(w)) for k in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"))  # O5
    if weight_decay and decoupled:  # O8
        w = R(w * c(1 - lr * weight_decay))
    elif weight_decay:
        g = R(g + c(weight_decay) * w)
    k = c(1 - beta1)
    state["exp_avg"] = m = R(m + k * (g - m)) if k < 0.5 else R(g - (g - m) * (1 - k))
    state["exp_avg_sq"] = q = v = R(R(v * c(beta2)) + (c(1 - beta2) * g) * g)
    if amsgrad:
        state["max_exp_avg_sq"] = q = np.where((v > a) | np.isnan(v), v, a)
    e = R(R(R(np.sqrt(q)) / c(math.sqrt(1 - power(beta2, t)))) + c(eps))
    return R(w + (c(-(lr / (1 - power(beta1, t)))) * m) / e)

def optimizer(case, tensors):
    dtype, w, state, after = tensors["rows"].dtype, widen(tensors["rows"]), {}, []
    c, R, settings = COMPUTE[dtype], (lambda x: widen(narrow(x, dtype))), dict(case["optimizer"])  # R8, R9
    update = {"sgd": sgd, "adam": adam}[settings.pop("type")]
    fine = (math.isfinite(x) and (x >= 0 or s == "dampening") and (x < 1 or "beta" not in s)
            for s, x in settings.items())
    nesterov = settings.get("nesterov") and (settings.get("dampening") or not settings.get("momentum"))
    if nesterov or not all(fine) or any(hook.get("max_norm", 1) <= 0 for hook in case.get("hooks", [])):
        raise ValueError("Hyperparameter")  # O12, K8
    gradients = widen(convert(tensors["gradients"], dtype)).reshape(case["steps"], *w.shape)  # O1
    for t, g in enumerate(gradients, 1):  # O3
        for hook in case.get("hooks", []):  # K1
            if hook["type"] == "clip_grad_norm":  # K8
                f = hook["max_norm"] / (math.sqrt(np.square(g, dtype="<f8").sum()) + 1e-6)
                g = g if f >= 1 else R(g * c(f))
            elif hook["type"] == "decay_toward_original":  # K9
                away = w - widen(convert(tensors["original"], dtype))
                w = R(w - c(settings["lr"] * hook["weight_decay"]) * away)
        w = update(w, g, state, t, c, R, **settings)  # O2
        after.append(w)
    return {name: narrow(x, dtype) for name, x in {"rows_after": np.concatenate(after), **state}.items()}

def read_safetensors(path):  # F13
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    def tensor(dtype, shape, data_offsets):
        return Tensor(dtype, np.frombuffer(data[start:][slice(*data_offsets)], BITS[dtype]).reshape(shape))
    header = json.loads(data[8:start])
    return header.pop("__metadata__", {}), {name: tensor(**info) for name, info in header.items()}

def write_safetensors(own, tensors):  # D1, D2, F15, F16
    keys = {f"trainable_tokens.{key}": own[key] for key in sorted(own)}
    header, data = {"__metadata__": {"format": "pt", **keys}}, b""
    for name, (dtype, bits) in sorted(tensors.items(), key=lambda i: ([*BITS].index(i[1].dtype), i[0])):
        begin, data = len(data), data + bits.tobytes()
        header[name] = {"dtype": dtype, "shape": bits.shape, "data_offsets": [begin, len(data)]}
    text = compact(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data

def adapter(case, tensors):
    folder, (dtype, bits), ids = HERE / case["directory"], tensors["table"], case["token_indices"]
    names = [f"base_model.model.{p}.trainable_tokens_delta" for p in [case["module"], *case["tied"]]]  # F17
    digest = f"sha256:{hashlib.sha256(bits.tobytes()).hexdigest()}"  # D7
    own = dict(vocab_size=str(len(bits)), embedding_dim=str(bits.shape[1]), token_indices=compact(ids),
               tokens=compact(case["tokens"]), base_digest=digest, base_dtype=dtype, init=case["init"],
               library_version=case["library_version"], format_version="1")  # D2, D3
    config = dict(auto_mapping=None, base_model_name_or_path=None, inference_mode=True, init_weights=True,
                  peft_type="TRAINABLE_TOKENS", peft_version="0.21.2", revision=None, token_indices=ids,
                  target_modules=[case["module"].split(".")[-1]], task_type="CAUSAL_LM")  # F3
    read = read_safetensors(folder / "adapter_model.safetensors")[1]
    ids_read = json.loads((folder / "adapter_config.json").read_bytes())["token_indices"]
    return {"rows": read[names[0]], "base_digest": digest, "token_indices": ids_read,
            "adapter_config.json": json.dumps(config, indent=2, sort_keys=True).encode(),  # F5, F6
            "adapter_model.safetensors": write_safetensors(own, dict.fromkeys(names, tensors["rows"]))}

def training_state(case, tensors):  # C3
    metadata, read = read_safetensors(HERE / case["directory"] / "training_state.safetensors")  # C1
    state = json.loads(metadata["trainable_tokens.training_state"])
    own = {"training_state": compact({"format_version": 1, "step": case["step"], "extra": case["extra"]})}
    return {**{name.removeprefix("optimizer."): t for name, t in read.items()}, "step": state["step"],
            "extra": state["extra"], "training_state.safetensors":
            write_safetensors(own, {f"optimizer.{n}": t for n, t in tensors.items()})}  # C2

def difference(got, want, tolerance):  # N2
    if not isinstance(got, Tensor) or not isinstance(want, Tensor):
        return "" if got == want else "other bytes" if type(got) is bytes else f"{got!r:.60} != {want!r:.60}"
    if (got.dtype, got.bits.shape) != (want.dtype, want.bits.shape):
        return f"got {got.dtype} {got.bits.shape}, not {want.dtype} {want.bits.shape}"
    a, b = (widen(t).astype("<f8") for t in (got, want))
    off = np.where((a == b) | np.isnan(a) & np.isnan(b), 0, np.abs(a - b))
    worst = np.where(np.isnan(off), math.inf, off).max(initial=0)
    bound = tolerance * max(1, np.abs(b[np.isfinite(b)]).max(initial=0))
    others = np.sum(got.bits != want.bits)
    equal = others == 0 if tolerance == 0 else worst <= bound
    return "" if equal else f"largest deviation {worst:.3g}, allowed {bound:.3g}; {others} elements differ"

def failures(case, tensors):
    try:
        got = globals()[case["operation"]](case, tensors)
    except Exception as error:
        got, tensors = {"expect_error": str(error)}, {}
    inputs = {"table", "rows", "upstream", "hidden", "gradients", "original"} - set(got)
    want = {name: t for name, t in tensors.items() if name not in inputs}
    want |= {name: case[name] for name in case if name in got or name == "expect_error"}
    want |= {file.name: file.read_bytes() for file in HERE.glob(f"{case.get('directory')}/*")}
    found = [(n, difference(got.get(n), want.get(n), case["tolerance"])) for n in sorted(got | want)]
    return [f"{name}: {text}" for name, text in found if text]

np.seterr(all="ignore")
cases = json.loads((HERE / "vectors.json").read_bytes())["cases"]
stored = collections.defaultdict(dict)
for path, tensor in read_safetensors(HERE / "vectors.safetensors")[1].items():
    stored[path.rpartition(".")[0]][path.rpartition(".")[2]] = tensor
failed = {case["name"]: text for case in cases if (text := failures(case, stored[case["name"]]))}
print(*(f"{name}: {'; '.join(text)}" for name, text in failed.items()), sep="\n", end="\n" if failed else "")
print(f"{len(cases) - len(failed)} passed, {len(failed)} failed")
sys.exit(1 if failed else 0)
