# ruff: noqa: C408 - the arguments of a call read as they do in the call itself
"""Malformed inputs to every public function: each call is refused by an exception of ours, or its result is right.

An argument has *cases*: values that mean the same as the right one (the result must then be the same), values that must be
refused, and values of which either will do. Hypothesis draws which arguments of which call are replaced, and by what.
"""

import contextlib
import dis
import io
import math
import os
import re
import signal
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from decimal import Decimal
from fractions import Fraction
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import probae
from probae import objectives, transforms
from probae.data.datasets import correlation_matrix, describe
from probae.data.datasets import load as load_data
from probae.heads import likelihoods, posteriors, priors
from probae.linear_gaussian import maximum_likelihood
from probae.linear_gaussian.rotation import rotate
from probae.models import make

PACKAGE = str(Path(probae.__file__).parent)
SECONDS = 30  # after which a call counts as one that hangs
N, D, L = 9, 4, 2

# 0 and 1 alone, which every dtype holds exactly; of full rank, no column constant
X = (np.random.RandomState(3).rand(N, D) < 0.5).astype(np.float64)
Z = np.round(np.random.RandomState(4).randn(N, L) * 4) / 4


# -- the oracle --------------------------------------------------------------------------------------------------------


#: what was expected, what came, or what to do
HELPS = re.compile(
    r"expected|got|needs?|takes?|give|use|make|drop|leave|try|unknown|missing|lacks|outside|cannot|damaged|no file|"
    r"not numeric|failed|too large|is empty|two names|declare|is no number|is (NaN|nan|-?inf)"
)


class Hangs(BaseException):
    """No library catches it."""


@contextlib.contextmanager
def alarm(seconds):
    def ring(*_):
        raise Hangs

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def origin(error):
    """The frame and the instruction at which an exception began."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    return trace.tb_frame.f_code, trace.tb_lasti


def flaw_of(error):
    """What is wrong with an exception, or None if it is one of ours: raised by a ``raise`` of the package, with a message
    that says what was expected, what came, or what to do."""
    if isinstance(error, OSError) and error.filename is not None:
        return None  # the operating system's word on a file, with its name
    code, at = origin(error)
    said = f"{type(error).__name__} from {os.path.relpath(code.co_filename, PACKAGE)}:{code.co_name}: {error}"
    if not isinstance(error, ValueError | TypeError | FloatingPointError | OSError):
        return f"no documented exception: {said}"
    if not code.co_filename.startswith(PACKAGE) or dis.opname[code.co_code[at]] != "RAISE_VARARGS":
        return f"not ours: {said}"
    if not HELPS.search(str(error)):
        return f"a message that does not help: {said}"
    return None


def tensors_of(result):
    """The numbers of a result by name, whatever it is."""
    if isinstance(result, torch.Tensor):
        return {"": result.detach()}
    if isinstance(result, probae.Evidence):
        # one draw, or none that counts, tells no error
        return {"values": result.values, "mc_stderr": result.mc_stderr.nan_to_num(nan=-1.0, posinf=torch.inf)}
    if isinstance(result, probae.Run):
        losses = torch.tensor([r["loss"] for r in result.records])
        return {"losses": losses, **tensors_of(result.model)}
    if isinstance(result, probae.Comparison):
        table = (
            result.table.drop(columns="seconds").select_dtypes("number").fillna(0.0)
        )  # a dash where nothing is to tell
        return {"table": torch.tensor(table.to_numpy(dtype=float))}
    if isinstance(result, nn.Module):
        return {name: value.detach() for name, value in result.state_dict().items()}
    if isinstance(result, dict):
        return {f"{k}.{n}": t for k, v in result.items() for n, t in tensors_of(v).items()}
    if isinstance(result, tuple):
        return {f"{i}.{n}": t for i, v in enumerate(result) for n, t in tensors_of(v).items()}
    if isinstance(result, np.ndarray):
        return {"": torch.from_numpy(result)}
    if isinstance(result, bool | int | float):
        return {"": torch.tensor(result)}
    return {}


def flaw_in(result, expected, same):
    """What is wrong with a result, given that of the right arguments: its kind, and, where they mean the same, its numbers."""
    if type(result) is not type(expected):
        return f"expected a {type(expected).__name__}, got a {type(result).__name__}"
    got, wanted = tensors_of(result), tensors_of(expected)
    for name, value in got.items():
        if value.is_meta or value.isnan().any() or (value == torch.inf).any():
            return f"{name or 'result'} is not finite: {value}"
    if not same:
        return None
    if got.keys() != wanted.keys():
        return f"expected {sorted(wanted)}, got {sorted(got)}"
    for name, value in got.items():
        if value.shape != wanted[name].shape:
            return f"{name}: expected shape {tuple(wanted[name].shape)}, got {tuple(value.shape)}"
        if not torch.allclose(value.double(), wanted[name].double(), rtol=1e-6, atol=1e-6, equal_nan=True):
            return f"{name}: expected {wanted[name]}, got {value}"
    return None


# fmt: off


# -- cases -------------------------------------------------------------------------------------------------------------

SAME, BAD, EITHER = "the same result", "refused", "either"


@dataclass(frozen=True)
class Case:
    """A value for an argument, made anew for each call, and what must come of it."""

    label: str
    make: Callable[[], Any]
    advice: str = BAD

    def __repr__(self):
        return f"{self.label} ({self.advice})"


@dataclass(frozen=True)
class Argument:
    """The right value of an argument, and its cases; arrays are also drawn by a strategy of their own."""

    right: Callable[[], Any]
    cases: tuple[Case, ...]
    generated: bool = False


def cases(advice, **makers):
    return tuple(Case(label, make if callable(make) else (lambda make=make: make), advice) for label, make in makers.items())


class Blank:
    """An object without anything."""


ODD = cases(
    BAD, none=None, empty_list=list, empty_dict=dict, empty_text="", text="nonsense", bytes=b"nonsense", object=Blank,
    a_class=lambda: Blank, function=lambda: max, complex=1j, a_set=lambda: {1, 2}, ellipsis=lambda: ...,
    generator=lambda: (i for i in range(3)), array_of_two=lambda: np.array([1, 2]), tensor_of_two=lambda: torch.tensor([1, 2]),
    frame=lambda: pd.DataFrame({"a": [1.0, 2.0]}), network=lambda: nn.Linear(2, 2), meta=lambda: torch.zeros((), device="meta"),
)


def without(*labels):
    return tuple(case for case in ODD if case.label not in labels)


def whole(value, least=1, huge=True, none=False, also=()):
    bad = cases(
        BAD, fraction=value + 0.5, as_float=float(value), nan=math.nan, infinite=math.inf, true=True, digits=str(value),
        below=least - 1, far_below=-(2**70), float_tensor=lambda: torch.tensor(1.5), listed=lambda: [value],
    )  # fmt: skip
    if huge:
        bad += cases(BAD, huge=2**50, beyond_64_bits=2**63, far_beyond=2**200)
    good = cases(
        SAME, numpy=lambda: np.int64(value), small=lambda: np.uint64(value), tensor=lambda: torch.tensor(value),
        array=lambda: np.array(value),
    )  # fmt: skip
    return Argument(lambda: value, without("none") + bad + good + (ODD[:0] if none else ODD[:1]) + also)


def number(value, zero=False, also=(), drop=()):
    bad = cases(
        BAD, negative=-1.0, nan=math.nan, infinite=math.inf, true=True, digits="1.0", huge_whole=10**400,
        nan_tensor=lambda: torch.tensor(math.nan), listed=lambda: [value],
    ) + (() if zero else cases(BAD, zero=0.0))  # fmt: skip
    good = cases(
        SAME, numpy=lambda: np.float64(value), tensor=lambda: torch.tensor(value, dtype=torch.float64),
        fraction=lambda: Fraction(value), decimal=lambda: Decimal(value), array=lambda: np.array(value),
    )  # fmt: skip
    extremes = cases(EITHER, tiny=1e-320, largest=1e308, small=1e-30, large=1e30)
    return Argument(lambda: value, tuple(c for c in without() + bad + good + extremes + also if c.label not in drop))


def real(value, also=()):
    return number(value, zero=True, also=also, drop=("negative",))


def without_extremes(argument):
    return replace(argument, cases=tuple(c for c in argument.cases if c.label not in {"tiny", "largest", "small", "large"}))


def per_feature(argument):
    """A number, or one for each feature."""
    several = {"listed", "array_of_two", "tensor_of_two"}
    return replace(argument, cases=tuple(replace(c, advice=EITHER) if c.label in several else c for c in argument.cases))


def unused(argument):
    """An argument that this call does not look at."""
    return replace(argument, cases=())


def choice(value, also=(), drop=()):
    bad = cases(BAD, number=3, true=True, upper=value.upper(), spaced=f" {value}", a_pair=lambda: (value, value))
    good = cases(SAME, numpy=lambda: np.str_(value))
    return Argument(lambda: value, tuple(c for c in ODD + bad + good + also if c.label not in drop))


def flag(value):
    odd = tuple(replace(case, advice=EITHER) if case.label == "none" else case for case in ODD)
    return Argument(lambda: value, odd + cases(BAD, no="no", two=2) + cases(SAME, numpy=lambda: np.bool_(value)))


def seed(value=3):
    bad = cases(
        BAD, fraction=1.5, nan=math.nan, true=True, digits="3", listed=lambda: [3], float_tensor=lambda: torch.tensor(1.5),
    )
    good = cases(SAME, numpy=lambda: np.int64(value), tensor=lambda: torch.tensor(value), array=lambda: np.array(value))
    far = cases(EITHER, negative=-1, huge=2**70, far_below=-(2**200))
    return Argument(lambda: value, ODD + bad + good + far)


def broken(x, place, value):
    x = np.array(x)
    x[place] = value
    return x


class Unlike(torch.Tensor):
    """A tensor by another name."""


def data(x=X, verdicts=None, also=()):
    """An array (N, D): the same numbers in other clothes, and what is no such array."""
    rows, columns = x.shape
    whole_numbers = bool((x == np.round(x)).all() and (x >= 0).all())
    same = cases(
        SAME, numpy=lambda: np.array(x), float32=lambda: x.astype("f4"), float16=lambda: x.astype("f2"),
        longdouble=lambda: x.astype(np.longdouble), big_endian=lambda: x.astype(">f8"), fortran=lambda: np.asfortranarray(x),
        backwards=lambda: np.ascontiguousarray(x[::-1])[::-1], mirrored=lambda: np.ascontiguousarray(x[:, ::-1])[:, ::-1],
        strided=lambda: np.repeat(x, 3, 1)[:, ::3], read_only=lambda: np.frombuffer(x.tobytes()).reshape(x.shape),
        listed=lambda: x.tolist(), list_of_arrays=lambda: list(x), matrix=lambda: np.asmatrix(x),
        unmasked=lambda: np.ma.masked_array(x), frame=lambda: pd.DataFrame(x),
        frame_of_one_name=lambda: pd.DataFrame(x, columns=["a"] * columns),
        frame_of_levels=lambda: pd.DataFrame(x, columns=pd.MultiIndex.from_product([["a"], range(columns)])),
        frame_nullable=lambda: pd.DataFrame(x).astype("Float64"),
        frame_with_a_strange_index=lambda: pd.DataFrame(x, index=[0] * rows), tensor=lambda: torch.tensor(x),
        half=lambda: torch.tensor(x, dtype=torch.float16), bfloat16=lambda: torch.tensor(x, dtype=torch.bfloat16),
        by_columns=lambda: torch.tensor(x.T.copy()).mT, parameter=lambda: nn.Parameter(torch.tensor(x)),
        with_history=lambda: torch.tensor(x, requires_grad=True) * 1, subclass=lambda: torch.tensor(x).as_subclass(Unlike),
        negated_view=lambda: torch.conj(torch.complex(torch.zeros(x.shape).double(), torch.tensor(-x))).imag,
        list_of_tensors=lambda: list(torch.tensor(x)),
    )
    if whole_numbers:
        same += cases(
            SAME, **{d: (lambda d=d: x.astype(d)) for d in ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "?", ">i4")},
            byte_tensor=lambda: torch.tensor(x, dtype=torch.uint8), bool_tensor=lambda: torch.tensor(x, dtype=torch.bool),
            int64_tensor=lambda: torch.tensor(x, dtype=torch.int64),
            frame_of_kinds=lambda: pd.DataFrame(x).astype({0: "Int64", 1: "boolean", 2: "uint8", 3: "float32"}),
            frame_int=lambda: pd.DataFrame(x.astype(int)),
        )
    bad = cases(
        BAD, nan=lambda: broken(x, (rows - 1, 1), np.nan), nan_tensor=lambda: torch.tensor(broken(x, (0, 0), np.nan)),
        infinite=lambda: broken(x, (2, 1), np.inf), minus_infinite=lambda: broken(x, (2, 1), -np.inf),
        beyond_float32=lambda: broken(x, (2, 1), 1e300),
        masked=lambda: np.ma.masked_array(x, mask=broken(np.zeros(x.shape, bool), (1, 1), True)), vector=lambda: x[:, 0],
        one_row=lambda: x[0], column_short=lambda: x[:, :-1], column_long=lambda: np.concatenate([x, x[:, :1]], 1),
        transposed=lambda: x.T, deep=lambda: x[:, :, None], no_rows=lambda: x[:0], no_columns=lambda: x[:, :0],
        no_columns_frame=lambda: pd.DataFrame(index=range(rows)), scalar=1.0, zero_dim=lambda: np.array(1.0),
        scalar_tensor=lambda: torch.tensor(1.0), none=None, text="nonsense", bytes=b"nonsense", number=3, object=Blank,
        a_class=lambda: Blank, function=lambda: max, a_set=lambda: {1, 2}, generator=lambda: (row for row in x),
        empty_list=list, empty_tuple=tuple, empty_dict=dict, ragged=lambda: [[1.0, 2.0], [1.0]],
        lists_of_text=lambda: [["a"] * columns] * rows, lists_of_none=lambda: [[None] * columns] * rows,
        nested=lambda: ((x, x), x), nested_dict=lambda: {"x": {"x": x}}, wrong_keys=lambda: {"nonsense": x},
        number_keys=lambda: {1: x, "1": x}, two_arrays=lambda: (x, x), differing_rows=lambda: (x, x[:-1]),
        objects=lambda: x.astype(object), objects_of_kinds=lambda: broken(x.astype(object), (0, 0), "a"),
        texts=lambda: x.astype("U"), byte_texts=lambda: x.astype("S"), complex=lambda: x + 1j,
        dates=lambda: x.astype("datetime64[s]"), spans=lambda: x.astype("timedelta64[s]"),
        structured=lambda: np.zeros((rows, columns), dtype=[("a", float)]), frame_of_text=lambda: pd.DataFrame(x).assign(a="a"),
        frame_of_dates=lambda: pd.DataFrame(x.astype("datetime64[s]")),
        frame_of_categories=lambda: pd.DataFrame(x).astype("category"),
        frame_with_gaps=lambda: pd.DataFrame(broken(x, (1, 1), np.nan)).astype("Float64"), series=lambda: pd.Series(x[:, 0]),
        complex_tensor=lambda: torch.tensor(x) + 1j, sparse=lambda: torch.tensor(x).to_sparse(),
        sparse_rows=lambda: torch.tensor(x).to_sparse_csr(),
        quantised=lambda: torch.quantize_per_tensor(torch.tensor(x).float(), 0.1, 0, torch.quint8),
        nested_tensor=lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        meta=lambda: torch.zeros(x.shape, device="meta"), model=lambda: probae.PPCA(columns, 1),
        memory=lambda: memoryview(b"nonsense"),
    )
    either = cases(
        EITHER, huge=lambda: broken(x, (2, 1), 1e38), huge_double=lambda: broken(x, (2, 1), 1e25), tiny=lambda: x * 1e-42,
        negative=lambda: -x, halves=lambda: x / 2, constant=lambda: np.ones((rows, columns)), one_datum=lambda: x[:1],
        two_data=lambda: x[:2], tuple_of_one=lambda: (x,), named=lambda: {"x": x},
        eight_bits=lambda: torch.tensor(x).to(torch.float8_e4m3fn),
        expanded=lambda: torch.zeros(1, columns).expand(rows, columns), object_scalar=lambda: np.array(None),
    )
    changed = verdicts or {}
    every = tuple(replace(c, advice=changed.get(c.label, c.advice)) for c in same + bad + either + also)
    return Argument(lambda: torch.tensor(x), every, generated=True)


# -- models ------------------------------------------------------------------------------------------------------------


def seeded(make_model):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make_model()


def vae(**options):
    return seeded(lambda: probae.VAE(D, L, hidden=(3,), **options))


def discrete():
    """A user's pair with one latent of two classes."""
    scores = nn.Parameter(torch.zeros(2))
    loc = nn.Parameter(torch.arange(2.0 * D).reshape(2, D) / D)
    encoder = seeded(lambda: nn.Linear(D, 2))

    def model(x):
        weights, means = pyro.param("scores", scores), pyro.param("loc", loc)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Categorical(logits=weights))
            pyro.sample("x", dist.Normal(means[z], 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Categorical(logits=encoder(x)))

    return probae.Pair(model, guide)


def labelled():
    """A plain pair whose programs take two arrays."""
    encoder, decoder = seeded(lambda: (nn.Linear(D + 1, L), nn.Linear(L + 1, D)))

    def model(x, y):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros(L), 1.0).to_event(1))
            inputs = torch.cat([z, y[:, None].to(z.dtype).expand(*z.shape[:-1], 1)], -1)
            pyro.sample("x", dist.Normal(decoder(inputs), 1.0).to_event(1), obs=x)

    def guide(x, y):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(encoder(torch.cat([x, y[:, None].to(x.dtype)], -1)), 1.0).to_event(1))

    return probae.Pair(model, guide)


def spoiled(model, value=math.nan):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def failing(error):
    def program(x):
        raise error

    return program


def models(right=vae, verdicts=None):
    """A model, and what is none."""
    bad = cases(
        BAD, number=3, true=True, name="vae", class_of_model=lambda: probae.VAE, constructor=lambda: partial(probae.VAE, D, L),
        no_program=lambda: SimpleNamespace(model=3, guide=3),
        no_guide=lambda: SimpleNamespace(model=discrete()._programs["model"], guide=3), tensor=lambda: torch.zeros(3),
        pair_in_a_list=lambda: [right()], on_meta=lambda: right().to("meta"), parameters_nan=lambda: spoiled(right()),
        fails=lambda: probae.Pair(failing(KeyError("k")), failing(KeyError("k"))),
        fails_in_torch=lambda: probae.Pair(lambda x: x @ x @ x, lambda x: None),
        observes_nothing=lambda: probae.Pair(lambda x: None, lambda x: None),
        no_plate=lambda: probae.Pair(lambda x: pyro.sample("x", dist.Normal(x, 1.0).to_event(2), obs=x), lambda x: None),
        no_arguments=lambda: probae.Pair(lambda: None, lambda: None), of_other_width=lambda: probae.VAE(D + 1, L, hidden=(3,)),
    )
    either = cases(
        EITHER, parameters_huge=lambda: spoiled(right(), 1e30), double=lambda: right().double(), half=lambda: right().half(),
        bfloat16=lambda: right().bfloat16(), complex=lambda: right().to(torch.complex64), mixed=lambda: _mixed(right()),
        unregistered=Unregistered,
    )
    changed = verdicts or {}
    every = without("a_class", "empty_dict", "empty_list", "a_set", "ellipsis") + bad + either
    return Argument(right, tuple(replace(c, advice=changed.get(c.label, c.advice)) for c in every))


def _mixed(model):
    next(model.parameters()).data = next(model.parameters()).data.double()
    return model


class Unregistered:
    """A user's plain class, with slots and no parameters."""

    __slots__ = ()

    def model(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(L), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(torch.zeros(D), 1.0).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(torch.zeros(L), 1.0).to_event(1))


# -- other arguments ---------------------------------------------------------------------------------------------------


def folder_with(name, content):
    folder = Path(tempfile.mkdtemp(dir=SCRATCH.name))
    (folder / name).write_bytes(content)
    return folder


SCRATCH = tempfile.TemporaryDirectory()


def fresh_folder():
    return tempfile.mkdtemp(dir=SCRATCH.name)


def saved():
    return probae.save(vae(), fresh_folder())


def numpy_file(array, name="x.npy"):
    file = io.BytesIO()
    (np.savez if name.endswith("z") else np.save)(file, array, allow_pickle=True)
    return folder_with(name, file.getvalue()) / name


ODD_PATHS = cases(BAD, number=3, nul="a\0b", nul_bytes=b"a\0b", fraction=1.5, a_tuple=lambda: ("a", "b")) + without(
    "text", "bytes", "empty_text"
)


def paths(right, also, same=lambda path: ()):
    return Argument(right, ODD_PATHS + also)


def device():
    bad = cases(BAD, empty="", text="nonsense", meta="meta", meta_device=lambda: torch.device("meta"), number_99=99,
                far="cuda:99", minus="cuda:-1", tpu="xla", hip="hip", negative=-1, fraction=0.5)  # fmt: skip
    if not torch.cuda.is_available():
        bad += cases(BAD, cuda="cuda", cuda_upper="CUDA", cuda_device=lambda: torch.device("cuda"), zero=0)
    good = cases(SAME, cpu="cpu", cpu_0="cpu:0", cpu_device=lambda: torch.device("cpu"))
    return Argument(lambda: "auto", without("text", "empty_text") + bad + good)


def optional(argument, absent=None):
    """The same, where None is right too."""
    kept = tuple(c for c in argument.cases if c.label != "none")
    return replace(argument, cases=kept + cases(EITHER, none=None))


def modes():
    other = cases(SAME, flat="flat", numpy=np.str_("flat")) + cases(EITHER, auto="auto", one=1, zero=0)
    return Argument(lambda: False, ODD + cases(BAD, number=3, upper="FLAT", listed=lambda: ["flat"]) + other)


def widths():
    bad = cases(
        BAD, zero=0, negative=-3, fraction=1.5, in_a_tuple=lambda: (0,), negative_in_a_tuple=lambda: (3, -1), true=True,
        text_in_a_tuple=lambda: ("3",), none_in_a_tuple=lambda: (None,), nested=lambda: ((3,),), floats=lambda: (3.0,),
        huge=lambda: (2**50,), far_beyond=lambda: (2**200,), array=lambda: np.array([[3]]),
    )  # fmt: skip
    good = cases(SAME, number=3, listed=lambda: [3], array=lambda: np.array([3]), numpy=lambda: np.int64(3),
                 tensor=lambda: torch.tensor([3]))  # fmt: skip
    drop = ("none", "empty_list", "empty_dict", "a_set", "array_of_two", "tensor_of_two", "generator", "empty_text")
    either = cases(EITHER, none=None, empty=(), generator=lambda: (i for i in (3,)), a_set=lambda: {3})
    return Argument(lambda: (3,), without(*drop) + bad + good + either)


def heads(right, none=True):
    bad = cases(
        BAD, name="normal_", number=1.0, torch_distribution=lambda: torch.distributions.Normal,
        a_class=lambda: likelihoods.Normal,
        bound=lambda: likelihoods.Normal().bind(D), prior=lambda: priors.Normal(L),
    )  # fmt: skip
    return Argument(right, without("none", "a_class") + bad + (cases(EITHER, none=None) if none else ()))


def networks(inputs, outputs):
    def right():
        return seeded(lambda: nn.Linear(inputs, outputs))

    bad = cases(
        BAD, narrow=lambda: nn.Linear(inputs - 1, outputs), wide=lambda: nn.Linear(inputs, outputs + 1), name="mlp",
        not_a_tensor=lambda: nn.LSTM(inputs, outputs), function=lambda: torch.relu, pair=vae, loss=nn.CrossEntropyLoss,
        convolution=lambda: nn.Conv2d(1, 1, 3), container=lambda: nn.ModuleList([right()]),
        embedding=lambda: nn.Embedding(inputs, outputs),
    )  # fmt: skip
    either = cases(
        EITHER, none=None, double=lambda: right().double(),
        lazy=lambda: nn.LazyLinear(outputs),
    )
    return Argument(right, without("none", "network", "function") + bad + either)


def prior_modules():
    bad = cases(BAD, name="normal", number=1, a_class=lambda: priors.Normal,
                distribution=lambda: dist.Normal(torch.zeros(L), 1.0).to_event(1))  # fmt: skip
    either = cases(
        EITHER, none=None, network=lambda: nn.Linear(2, 2), head=lambda: likelihoods.Normal(),
        laplace=lambda: priors.Laplace(L), other=lambda: priors.Normal(L + 1),
    )
    return Argument(lambda: priors.Normal(L), without("none", "a_class", "network") + bad + either)


FEATURES, LATENTS = whole(D), whole(L)
ACTIVATION = choice("relu")
NAME_OR_HEAD = choice("normal", cases(EITHER, head=lambda: likelihoods.Normal("predicted"), point="point"))


@dataclass(frozen=True)
class Call:
    """A public function, with right values of its arguments."""

    function: Callable[..., Any]
    arguments: dict[str, Argument] = field(default_factory=dict)
    weight: int = 1

    def __call__(self, **given):
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            torch.manual_seed(0)
            warnings.simplefilter("ignore")
            return self.function(**{name: a.right() for name, a in self.arguments.items()} | given)


def fit(**arguments):
    return probae.fit(**arguments, progress=False)


def mapped(x=X):
    file = numpy_file(x)
    return np.load(file, mmap_mode="r")


STREAMS = cases(
    EITHER, mapped=mapped, mapped_nan=lambda: mapped(broken(X, (8, 0), np.nan)),
    mapped_empty=lambda: np.load(numpy_file(np.zeros((1, 4)))), mapped_objects=lambda: mapped(X.astype("U")),
    mapped_complex=lambda: mapped(X + 1j), dataset=lambda: TensorDataset(torch.tensor(X)),
    dataset_double=lambda: TensorDataset(torch.tensor(X), torch.tensor(X)),
    loader=lambda: DataLoader(TensorDataset(torch.tensor(X)), batch_size=4),
    loader_of_nan=lambda: DataLoader(TensorDataset(torch.tensor(broken(X, (8, 0), np.nan))), batch_size=4),
    loader_of_other_width=lambda: DataLoader(TensorDataset(torch.tensor(X[:, :3])), batch_size=4),
    loader_without_batches=lambda: DataLoader(TensorDataset(torch.tensor(X)), batch_size=40, drop_last=True),
    dataset_of_texts=lambda: ["a", "b"], iterable=lambda: DataLoader(_Endless()),
)


class _Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(torch.tensor(X))


ANY_WIDTH = dict.fromkeys(("column_short", "column_long", "transposed"), EITHER)
GAPS = dict.fromkeys(("nan", "nan_tensor", "masked", "frame_with_gaps"), EITHER)
OWN_DTYPE = dict.fromkeys(("float16", "half", "bfloat16"), EITHER)
# four numbers may be a datum of four features, or four data of a pair that broadcasts them
FORMLESS = {"one_row": EITHER}
WHOLE = dict.fromkeys(
    ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "?", ">i4", "byte_tensor", "bool_tensor", "int64_tensor", "frame_int"),
    EITHER,
)


STREAMED = data(also=STREAMS)
RUN_OPTIONS = dict(particles=whole(3, huge=False), seed=seed(), compile=modes())

CALLS = {
    "fit": Call(
        fit,
        dict(
            model=models(verdicts={"unregistered": BAD, "constructor": EITHER}), data=STREAMED,
            validation=optional(data(also=STREAMS)),
            objective=Argument(
                lambda: "elbo",
                without("none", "function")
                + cases(
                    BAD, a_class=lambda: objectives.ELBO, number=3, module=lambda: nn.MSELoss(),
                    function=lambda: torch.nn.functional.mse_loss, listed=lambda: [objectives.ELBO()],
                )
                + cases(SAME, none=None, made=objectives.ELBO, numpy=lambda: np.str_("elbo")),
            ),
            steps=whole(2, huge=False), batch_size=whole(4, huge=False),
            lr=number(
                1e-3,
                also=cases(
                    BAD, strange_key=lambda: {"nonsense": 1.0}, of_text=lambda: {"model": "a"},
                    nan_inside=lambda: {"model": math.nan}, keys=lambda: {1: 1.0}, missing=lambda: {"objective": 1e-3},
                )
                + cases(SAME, by_name=lambda: {"model": 1e-3}),
            ),
            optimizer=Argument(
                lambda: "adam",
                without("function", "a_class", "none")
                + cases(
                    BAD, none=None, number=3, upper="ADAM", function=lambda: max, a_class=lambda: Blank,
                    gives_none=lambda: lambda groups: None,
                    instance=lambda: torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), raises=lambda: lambda: 3,
                )
                + cases(SAME, constructor=lambda: torch.optim.Adam),
            ),
            scheduler=Argument(
                lambda: None,
                without("none", "function", "a_class")
                + cases(
                    BAD, number=3, upper="COSINE", function=lambda: max, a_class=lambda: Blank,
                    gives_none=lambda: lambda optimizer: None, gives_number=lambda: lambda optimizer: 3,
                ),
            ),
            clip=optional(number(1e6)), precision=choice("float32"), seed=seed(), device=device(), compile=modes(),
            every=optional(whole(1, huge=False)),
            patience=optional(
                replace(whole(1), right=lambda: None, cases=tuple(c for c in whole(1, huge=False).cases if c.advice == BAD))
            ),
            checkpoint=optional(
                paths(
                    fresh_folder,
                    cases(
                        BAD, file=lambda: folder_with("a", b"") / "a", below_a_file=lambda: folder_with("a", b"") / "a" / "b",
                        proc="/proc/nonsense", long="a" * 5000,
                    )
                    + cases(EITHER, bytes=lambda: os.fsencode(fresh_folder()), path=lambda: Path(fresh_folder())),
                )
            ),
            callbacks=Argument(
                tuple,
                without(
                    "none", "empty_list", "empty_dict", "empty_text", "bytes", "text", "a_set", "generator", "array_of_two",
                    "frame", "tensor_of_two",
                )
                + cases(
                    BAD, none=None, text="nonsense", number=3, of_numbers=lambda: [3], of_none=lambda: [None],
                    array=lambda: np.array([1, 2]), frame=lambda: pd.DataFrame({"a": [1]}), a_dict=lambda: {"a": max},
                    of_text=lambda: ["print"],
                )
                + cases(SAME, empty_list=list, of_one=lambda: [lambda run: None]),
            ),
        ),
        weight=6,
    ),
    "fit of discrete latents": Call(
        fit,
        dict(
            model=models(discrete), data=data(verdicts=FORMLESS), steps=Argument(lambda: 2, ()),
            objective=choice("elbo", cases(EITHER, none=None), drop=("none",)), batch_size=Argument(lambda: 4, ()),
        ),
    ),
    "fit of two arrays": Call(
        lambda x, y, **options: fit(data=(x, y), **options),
        dict(
            model=Argument(labelled, ()), x=data(verdicts=WHOLE),
            y=Argument(
                lambda: torch.tensor(X[:, 0]),
                cases(
                    BAD, short=lambda: X[1:, 0], scalar=1.0, none=None, text="a", nan=lambda: broken(X[:, 0], 3, np.nan),
                    texts=lambda: X[:, 0].astype("U"), empty=lambda: X[:0, 0], wide=lambda: X,
                    meta=lambda: torch.zeros(N, device="meta"),
                )
                + cases(
                    SAME, numpy=lambda: X[:, 0], whole=lambda: X[:, 0].astype(int), listed=lambda: X[:, 0].tolist(),
                    series=lambda: pd.Series(X[:, 0]), backwards=lambda: np.ascontiguousarray(X[::-1, 0])[::-1],
                    nullable=lambda: pd.Series(X[:, 0]).astype("Int64"),
                ),
            ),
            steps=Argument(lambda: 2, ()), batch_size=Argument(lambda: 4, ()),
        ),
    ),
    "log_weights": Call(
        probae.log_weights, dict(model=models(), x=data(), memory=optional(whole(2**20, huge=False)), **RUN_OPTIONS), weight=3,
    ),
    "log_evidence": Call(
        probae.log_evidence,
        dict(
            model=models(), x=STREAMED, method=choice("iwae", cases(BAD, exact="exact", enumerate="enumerate")),
            **RUN_OPTIONS | {"particles": optional(RUN_OPTIONS["particles"])},
        ),
        weight=3,
    ),
    "log_evidence of PPCA": Call(probae.log_evidence, dict(model=models(lambda: seeded(lambda: probae.PPCA(D, L))), x=data())),
    "log_evidence of counts": Call(
        partial(probae.log_evidence, method="iwae", particles=3),
        dict(model=models(lambda: vae(likelihood=likelihoods.Bernoulli())), x=data()),
    ),
    "log_evidence of discrete latents": Call(
        probae.log_evidence,
        dict(model=models(discrete), x=data(verdicts=FORMLESS), method=choice("enumerate", cases(BAD, exact="exact"))),
    ),
    "compare": Call(
        probae.compare,
        dict(
            models=Argument(
                lambda: {"a": vae()},
                without()
                + cases(
                    BAD, model=vae, listed=lambda: [vae()], of_none=lambda: {"a": None}, of_nothing=lambda: {"a": []},
                    twice=lambda: {1: vae(), "1": vae()}, of_text=lambda: {"a": "vae"}, of_a_class=lambda: {"a": probae.VAE},
                    other_width=lambda: {"a": vae(), "b": probae.PPCA(D + 1, 1)},
                    units=lambda: {"a": vae(), "b": vae(likelihood=likelihoods.Bernoulli())},
                )
                + cases(
                    SAME, numbered=lambda: {1: vae()}, of_a_list=lambda: {"a": [vae()]}, of_a_tuple=lambda: {"a": (vae(),)},
                ),
            ),
            x=data(),
            train=optional(
                replace(data(), right=lambda: None, cases=tuple(c for c in data(verdicts=GAPS).cases if c.advice != SAME))
            ),
            method=choice("iwae", cases(BAD, exact="exact")), particles=optional(whole(3, huge=False)), seed=seed(),
        ),
        weight=2,
    ),
    "sample": Call(probae.sample, dict(model=models(verdicts={"of_other_width": EITHER}), n=whole(3), seed=seed()), weight=2),
    "sample like": Call(
        probae.sample,
        dict(
            model=models(discrete, {"of_other_width": EITHER}), n=Argument(lambda: 3, ()),
            like=data(verdicts=GAPS | FORMLESS | dict.fromkeys(("infinite", "minus_infinite", "beyond_float32"), EITHER)),
        ),
    ),
    "encode": Call(probae.encode, dict(model=models(), x=data())),
    "encode of discrete latents": Call(probae.encode, dict(model=models(discrete), x=data(verdicts=FORMLESS))),
    "decode": Call(
        probae.decode,
        dict(model=models(verdicts={"of_other_width": EITHER}), z=data(Z, FORMLESS | {"deep": BAD, "vector": BAD})), weight=2,
    ),
    "reconstruct": Call(probae.reconstruct, dict(model=models(), x=data()), weight=2),
    "reconstruct of discrete latents": Call(probae.reconstruct, dict(model=models(discrete), x=data(verdicts=FORMLESS))),
    "save": Call(
        lambda model, folder: Path(probae.save(model, folder)).is_dir(),
        dict(
            model=Argument(
                vae,
                without("network")
                + cases(
                    BAD, on_meta=lambda: vae().to("meta"), a_class=lambda: probae.VAE, tensors=lambda: {"a": torch.zeros(2)},
                    lazy=lambda: nn.LazyLinear(3),
                )
                + cases(EITHER, network=lambda: nn.Linear(2, 2)),
            ),
            folder=paths(
                fresh_folder,
                cases(
                    BAD, file=lambda: folder_with("a", b"") / "a", below=lambda: folder_with("a", b"") / "a" / "b",
                    long="a" * 5000, proc="/proc/nonsense",
                )
                + cases(SAME, bytes=lambda: os.fsencode(fresh_folder()), path=lambda: Path(fresh_folder())),
            ),
        ),
    ),
    "load": Call(
        probae.load,
        dict(
            folder=paths(
                saved,
                cases(
                    BAD, missing="/nonexistent", empty=fresh_folder, file=lambda: folder_with("a", b"") / "a",
                    garbage=lambda: folder_with("model.json", b"\xff\x00"), torn=lambda: _torn(),
                    list_inside=lambda: folder_with("model.json", b"[]"), long="a" * 5000,
                )
                + cases(SAME, text=lambda: str(saved()), bytes=lambda: os.fsencode(saved())),
            ),
            into=optional(
                Argument(
                    lambda: None,
                    without("none")
                    + cases(
                        BAD, other=lambda: probae.PPCA(D, L), wider=lambda: probae.VAE(D, L, hidden=(5,)),
                        a_class=lambda: probae.VAE, number=3,
                    )
                    + cases(SAME, fresh=lambda: probae.VAE(D, L, hidden=(3,)), on_meta=lambda: vae().to("meta")),
                )
            ),
        ),
    ),
    "Pair": Call(
        lambda model, guide, owner: type(probae.Pair(model, guide, owner)),
        dict(
            model=Argument(
                lambda: discrete()._programs["model"], without("function", "a_class", "network") + cases(BAD, number=3)
            ),
            guide=Argument(lambda: None, without("none", "function", "a_class", "network") + cases(BAD, number=3)),
            owner=Argument(
                lambda: None,
                cases(EITHER, text="a", number=3, object=Blank, network=lambda: nn.Linear(2, 2), a_class=lambda: Blank),
            ),
        ),
    ),
    "Run, refused": Call(
        lambda model: probae.log_weights(model, torch.tensor(X), 2),
        dict(model=Argument(vae, cases(BAD, empty=lambda: SimpleNamespace(history=1, records=[])))),
    ),
}


def _torn():
    folder = saved()
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-3])
    return folder


def constructor(cls, **arguments):
    return Call(cls, arguments)


NETWORKS = dict(encoder=networks(D, 2 * L), decoder=networks(L, D))
AE_NETWORKS = dict(encoder=networks(D, L), decoder=networks(L, D))
CALLS |= {
    "PPCA": constructor(probae.PPCA, features=FEATURES, latents=LATENTS),
    "FactorAnalysis": constructor(probae.FactorAnalysis, features=FEATURES, latents=LATENTS),
    "Autoencoder": constructor(
        probae.Autoencoder, features=FEATURES, latents=LATENTS, hidden=widths(),
        likelihood=heads(lambda: likelihoods.Normal(1.0)), activation=ACTIVATION,
    ),
    "Autoencoder with networks": constructor(probae.Autoencoder, features=FEATURES, latents=LATENTS, **AE_NETWORKS),
    "StochasticAutoencoder": constructor(
        probae.StochasticAutoencoder, features=FEATURES, latents=LATENTS, hidden=widths(), scale=optional(number(0.5)),
        likelihood=heads(likelihoods.Laplace), activation=ACTIVATION,
    ),
    "StochasticAutoencoder that predicts": Call(
        partial(probae.StochasticAutoencoder, D, L, (3,), scale=None), dict(floor=number(0.5, zero=True))
    ),
    "SparseAutoencoder": constructor(
        probae.SparseAutoencoder, features=FEATURES, latents=LATENTS, hidden=widths(), prior=choice("laplace"),
        rate=number(2.0), learned_rate=flag(True), posterior=choice("point", cases(EITHER, head=posteriors.Point)),
        likelihood=heads(lambda: likelihoods.Normal(1.0)), activation=ACTIVATION,
    ),
    "SparseCoding": constructor(
        probae.SparseCoding, features=FEATURES, latents=LATENTS, rate=number(2.0), method=choice("fista"),
        nonnegative=flag(True), iterations=whole(3),
    ),
    "SpikeAndSlab": constructor(
        probae.SpikeAndSlab, features=FEATURES, latents=LATENTS, hidden=widths(), slab=number(2.0), learned=flag(True),
        likelihood=heads(likelihoods.Normal), activation=ACTIVATION,
    ),
    "VAE": Call(
        probae.VAE,
        dict(
            features=FEATURES, latents=LATENTS, hidden=widths(), prior=prior_modules(), likelihood=heads(likelihoods.Normal),
            posterior=NAME_OR_HEAD, activation=ACTIVATION,
        ),
        weight=2,
    ),
    "VAE with networks": constructor(probae.VAE, features=FEATURES, latents=LATENTS, **NETWORKS),
    "Independent": constructor(probae.Independent, features=FEATURES, classes=optional(whole(3, 2))),
    "GaussianMixture": constructor(probae.GaussianMixture, features=FEATURES, components=whole(2), diagonal=flag(True)),
    "Dequantised": constructor(
        probae.Dequantised,
        pair=replace(
            models(),
            cases=tuple(
                c
                for c in models().cases
                if c.label
                in {
                    "none", "text", "number", "object", "class_of_model", "tensor", "no_program", "no_guide", "network",
                    "frame",
                }
            )
            + cases(BAD, of_counts=lambda: probae.Dequantised(vae())),
        ),
    ),
    "Transformed": constructor(
        probae.Transformed,
        pair=replace(
            models(),
            cases=tuple(
                c
                for c in models().cases
                if c.label in {"none", "text", "number", "object", "class_of_model", "tensor", "no_program", "network"}
            ),
        ),
        transform=Argument(
            transforms.Logit,
            without()
            + cases(
                BAD, number=3, of_numbers=lambda: [3], a_class=lambda: transforms.Logit,
                torch_transform=lambda: torch.distributions.transforms.ExpTransform(),
            )
            + cases(EITHER, twice=lambda: [transforms.Affine(0, 2), transforms.Logit()]),
        ),
    ),
    "make": constructor(make, name=choice("ppca"), features=FEATURES, latents=LATENTS),
    "MLP": constructor(probae.nn.MLP, inputs=whole(3), outputs=whole(2), hidden=widths(), activation=ACTIVATION),
    "Flattened": Call(
        lambda module, shape: probae.nn.Flattened(module, shape)(torch.zeros(2, 64)),
        dict(
            module=Argument(lambda: nn.Conv2d(1, 1, 3), without("network") + cases(BAD, a_class=lambda: nn.Conv2d)),
            shape=Argument(
                lambda: (1, 8, 8),
                without("a_set", "array_of_two", "tensor_of_two", "generator", "empty_list")
                + cases(
                    BAD, number=64, floats=lambda: (1.0, 8.0, 8.0), negative=lambda: (1, -8, -8), zero=lambda: (1, 0, 8),
                    texts=lambda: ("1", "8", "8"), of_none=lambda: (1, None, 8), other_size=lambda: (1, 8, 9), empty=(),
                )
                + cases(SAME, listed=lambda: [1, 8, 8], array=lambda: np.array([1, 8, 8]), size=lambda: torch.Size((1, 8, 8))),
            ),
        ),
    ),
    **{f"priors.{cls.__name__}": constructor(cls, latents=LATENTS) for cls in (priors.Flat, priors.Normal)},
    **{
        f"priors.{cls.__name__}": constructor(cls, latents=LATENTS, rate=number(2.0), learned=flag(True))
        for cls in (priors.Laplace, priors.Exponential, priors.Horseshoe)
    },
    "priors.StudentT": Call(
        lambda **o: priors.StudentT(**o)().log_prob(torch.zeros(L)),
        dict(latents=LATENTS, rate=without_extremes(number(2.0)), learned=flag(False), df=without_extremes(number(3.0))),
    ),
    **{
        f"likelihoods.{cls.__name__}": Call(
            lambda features, cls=cls, **o: cls(**o).bind(features),
            dict(
                features=FEATURES,
                scale=choice(
                    "feature",
                    cases(EITHER, number=0.5, numpy=np.float32(0.5), tensor=lambda: torch.tensor(0.5))
                    + cases(BAD, zero=0.0, negative=-1.0, nan=math.nan, huge_whole=10**400), drop=("number",),
                ),
                learned=optional(flag(True)), floor=number(0.5, zero=True),
            ),
        )
        for cls in (likelihoods.Normal, likelihoods.Laplace)
    },
    "likelihoods.DiscretisedNormal": Call(
        lambda features, **o: (likelihoods.DiscretisedNormal(**o).bind(features)(torch.zeros(2, D)).log_prob(torch.ones(D))),
        dict(
            features=Argument(lambda: D, ()), high=whole(3, huge=False), low=whole(0, -(2**53), huge=False),
            scale=without_extremes(number(0.5)), floor=without_extremes(number(0.5, zero=True)),
        ),
    ),
    "likelihoods.Binomial": Call(
        lambda features, total_count: (
            likelihoods.Binomial(total_count).bind(features)(torch.zeros(D)).log_prob(torch.ones(D))
        ),
        dict(features=Argument(lambda: D, ()), total_count=whole(3)),
    ),
    "likelihoods.Categorical": Call(
        lambda features, classes: likelihoods.Categorical(classes).bind(features), dict(features=FEATURES, classes=whole(3, 2)),
    ),
    **{
        f"likelihoods.{cls.__name__}": Call(lambda features, cls=cls: cls().bind(features), dict(features=FEATURES))
        for cls in (likelihoods.Bernoulli, likelihoods.Poisson)
    },
    "posteriors.Point": constructor(posteriors.Point, positive=flag(True)),
    "posteriors.TopK": constructor(posteriors.TopK, k=whole(3)),
    "posteriors.BatchTopK": constructor(posteriors.BatchTopK, k=whole(3), memory=whole(3)),
    "posteriors.JumpReLU": constructor(posteriors.JumpReLU, threshold=number(0.5), bandwidth=number(0.5)),
    "posteriors.named": constructor(
        lambda **o: {"width": posteriors.named(**o).width}, posterior=NAME_OR_HEAD, positive=flag(False)
    ),
    "objectives.ELBO": constructor(
        objectives.ELBO, particles=whole(3),
        beta=number(
            0.5, zero=True, also=cases(EITHER, warmup=lambda: objectives.Warmup(3)), drop=("function", "a_class", "network"),
        ),
        analytic_kl=flag(False), gradient=choice("stl"),
    ),
    "objectives.IWAE": constructor(objectives.IWAE, particles=whole(3), gradient=choice("dreg")),
    "objectives.Matryoshka": constructor(objectives.Matryoshka, particles=whole(3), sizes=Argument(lambda: (2, 4), ())),
    "objectives.AuxiliaryK": constructor(objectives.AuxiliaryK, k=whole(3), patience=whole(3)),
    "objectives.GatedAuxiliary": constructor(objectives.GatedAuxiliary, rate=number(2.0)),
    "objectives.Reconstruction": constructor(objectives.Reconstruction, particles=whole(3)),
    "objectives.Warmup": Call(
        lambda **o: objectives.Warmup(**o)(torch.tensor(1)),
        dict(steps=whole(3, huge=False), start=without_extremes(real(0.5)), end=without_extremes(real(2.0))),
    ),
    "objectives.Sum": Call(
        lambda terms: objectives.Sum(*terms),
        dict(
            terms=Argument(
                lambda: (objectives.ELBO(),),
                cases(
                    BAD, number=lambda: (3,), network=lambda: (nn.Linear(2, 2),), text=lambda: ("elbo",), none=lambda: (None,),
                    nothing=(),
                ),
            )
        ),
    ),
    "objectives.Scaled": constructor(
        objectives.Scaled, term=Argument(objectives.ELBO, ODD + cases(BAD, number=3)),
        factor=real(0.5, cases(EITHER, negative=-1.0)),
    ),
    "transforms.Affine": constructor(
        transforms.Affine, loc=per_feature(real(0.5, cases(EITHER, negative=-1.0))),
        scale=per_feature(
            number(
                2.0,
                also=cases(BAD, nested=lambda: [[1.0], [2.0]], with_zero=lambda: [1.0, 0.0, 1.0, 1.0])
                + cases(EITHER, of_four=lambda: [2.0] * 4),
            )
        ),
    ),
    "transforms.Affine.standardising": constructor(transforms.Affine.standardising, x=data(verdicts=ANY_WIDTH | GAPS)),
    "transforms.Logit": Call(
        transforms.Logit, dict(low=real(0.0, cases(EITHER, negative=-1.0)), high=real(1.0), margin=number(0.25, zero=True)),
    ),
    **{
        f"{cls.__name__}.maximum_likelihood": Call(
            lambda x, cls=cls: seeded(lambda: cls(D, L)).maximum_likelihood(x), dict(x=data())
        )
        for cls in (probae.PPCA, probae.FactorAnalysis)
    },
    "Independent.maximum_likelihood": Call(lambda x: probae.Independent(D).maximum_likelihood(x), dict(x=data())),
    "Independent.maximum_likelihood of counts": Call(lambda x: probae.Independent(D, 2).maximum_likelihood(x), dict(x=data())),
    "GaussianMixture.maximum_likelihood": Call(
        lambda **o: probae.GaussianMixture(D, 2).maximum_likelihood(**o),
        dict(x=data(), floor=number(0.25, zero=True), start=seed()),
    ),
    "Dequantised.maximum_likelihood": Call(
        lambda **o: probae.Dequantised(probae.PPCA(D, L)).maximum_likelihood(**o), dict(x=data(), seed=seed())
    ),
    "log_evidence of Dequantised": Call(
        lambda x: probae.log_evidence(probae.Dequantised(probae.PPCA(D, L)), x, "iwae", particles=3), dict(x=data())
    ),
    "log_evidence of Transformed": Call(
        lambda x: probae.log_evidence(probae.Transformed(probae.PPCA(D, L), transforms.Logit(-1, 2)), x), dict(x=data())
    ),
    "encode of Transformed": Call(
        lambda x: probae.encode(probae.Transformed(vae(), transforms.Logit(-1, 2)), x), dict(x=data())
    ),
    "reconstruct of Transformed": Call(
        lambda x: probae.reconstruct(probae.Transformed(vae(), transforms.Logit(-1, 2)), x), dict(x=data())
    ),
    "decode of Transformed": Call(
        lambda z: probae.decode(probae.Transformed(vae(), transforms.Logit(-1, 2)), z), dict(z=data(Z, FORMLESS))
    ),
    "sample of Dequantised": Call(
        lambda **o: probae.sample(probae.Dequantised(discrete()), 3, **o), dict(like=data(verdicts=FORMLESS), seed=seed())
    ),
    "maximum_likelihood.ppca": constructor(maximum_likelihood.ppca, x=data(verdicts=ANY_WIDTH | OWN_DTYPE), latents=LATENTS),
    "maximum_likelihood.factor_analysis": constructor(
        maximum_likelihood.factor_analysis, x=data(verdicts=ANY_WIDTH | OWN_DTYPE), latents=LATENTS, floor=number(0.005),
        tolerance=number(1e-6), max_iterations=whole(50, 0, huge=False), starts=whole(2, huge=False), seed=seed(),
    ),
    "rotate": constructor(
        rotate, weight=data(np.round(Z * 4), ANY_WIDTH | OWN_DTYPE | {"beyond_float32": EITHER}), method=choice("varimax"),
        kaiser=flag(True), starts=whole(2, huge=False), seed=seed(), tolerance=number(1e-7),
        max_iterations=whole(100, 0, huge=False),
    ),
    "rotated": Call(lambda method: seeded(lambda: probae.FactorAnalysis(D, L)).rotated(method), dict(method=choice("varimax"))),
    "datasets.load": Call(
        lambda **o: load_data(**o).train,
        dict(
            name_or_path=paths(
                lambda: numpy_file(np.arange(80.0).reshape(20, 4) / 3),
                cases(
                    BAD, unknown="nonsense", empty_text="", missing="/nonexistent/x.npy", other="x.txt", folder=fresh_folder,
                    garbage=lambda: folder_with("x.npy", b"\xff\x00nonsense") / "x.npy",
                    garbage_csv=lambda: folder_with("x.csv", b"\xff\x00nonsense\n\xfe") / "x.csv",
                    empty=lambda: folder_with("x.csv", b"") / "x.csv",
                    objects=lambda: numpy_file(np.array([[1, "a"]] * 20, dtype=object)),
                    complex=lambda: numpy_file(np.ones((20, 2)) * 1j), nan=lambda: numpy_file(np.full((20, 2), np.nan)),
                    texts=lambda: numpy_file(np.full((20, 2), "a")), few=lambda: numpy_file(np.ones((3, 2))),
                    flat=lambda: numpy_file(np.ones(20)), scalar=lambda: numpy_file(np.float64(1)),
                    words=lambda: folder_with("x.csv", b"a,b\n" + b"u,v\n" * 20) / "x.csv",
                    ragged=lambda: folder_with("x.csv", b"1,2\n1\n1,2,3\n" * 9) / "x.csv",
                    no_zip=lambda: folder_with("x.npz", b"PK nonsense") / "x.npz", correlations="harman74", long="a" * 5000,
                    long_file="a" * 5000 + ".npy", huge=lambda: numpy_file(np.full((20, 2), 1e300)),
                    dates=lambda: numpy_file(np.zeros((20, 2), dtype="datetime64[s]")),
                ),
            ),
            seed=Argument(
                lambda: 3,
                tuple(c for c in seed().cases if c.label not in {"negative", "huge", "far_below"})
                + cases(BAD, negative=-1, huge=2**40),
            ),
        ),
        weight=2,
    ),
    "datasets.load by name": Call(
        load_data,
        dict(
            name_or_path=Argument(lambda: "mnist", cases(BAD, bfi="bfi")),
            root=Argument(
                lambda: "/nonexistent", cases(BAD, number=3, nul="a\0b", a_tuple=lambda: ("a",), object=Blank, empty="")
            ),
        ),
    ),
    "describe": Call(
        lambda root: len(describe(root=root)),
        dict(
            root=optional(
                paths(lambda: None, cases(EITHER, text="nonsense", bytes=b"nonsense", empty_text="", long="a" * 5000))
            )
        ),
    ),
    "correlation_matrix": Call(
        correlation_matrix,
        dict(
            name=Argument(lambda: "harman74", ODD + cases(BAD, number=3, other="digits")),
            root=paths(
                lambda: "/nonexistent", cases(EITHER, text="nonsense", bytes=b"nonsense", empty_text="", long="a" * 5000),
            ),
        ),
    ),
}

# fmt: on


# -- the tests ---------------------------------------------------------------------------------------------------------


def flaw(name, chosen):
    """What is wrong with what comes of a call in which some arguments are replaced; None if nothing is."""
    call, expected = CALLS[name], right_of(name)
    verdicts = {case.advice for case in chosen.values()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, about its prototypes
        replacing = {argument: case.make() for argument, case in chosen.items()}
    try:
        with alarm(SECONDS):
            result = call(**replacing)
    except Hangs:
        return f"hangs for more than {SECONDS} s"
    except Exception as error:
        refused = verdicts == {SAME} and expected is not None
        return flaw_of(error) or (f"refused, {type(error).__name__}: {error}" if refused else None)
    # a model without parameters computes in the data's own dtype
    fits = {"beyond_float32", "unregistered"} <= {case.label for case in chosen.values()}
    if BAD in verdicts and not fits:
        return f"accepted, with the result {result!r:.300}"
    return flaw_in(result, expected, verdicts == {SAME})


@cache
def right_of(name):
    """The result of right arguments, or None where files are needed that need not be there."""
    try:
        return CALLS[name]()
    except FileNotFoundError:
        return None


NUMBERS = st.sampled_from(["f8", "f4", "f2", ">f8", "i8", "i4", ">i2", "u1", "?", "c16", "U2", "S2", "M8[s]", "O"])
ARRAYS = arrays.arrays(NUMBERS.map(np.dtype), arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=D + 1))


@st.composite
def replaced(draw):
    """A call, and cases for one of its arguments, or two."""
    name = draw(st.sampled_from([name for name in CALLS for _ in range(CALLS[name].weight)]))
    arguments = CALLS[name].arguments
    candidates = [argument for argument in arguments if arguments[argument].cases]
    chosen = {}
    for argument in draw(st.lists(st.sampled_from(candidates), min_size=1, max_size=2, unique=True)):
        if arguments[argument].generated and draw(st.integers(0, 4)) == 0:
            array = draw(ARRAYS)
            chosen[argument] = Case(f"{array!r}", partial(np.array, array), EITHER)
        else:
            chosen[argument] = draw(st.sampled_from(arguments[argument].cases))
    return name, chosen


FUZZ = settings(
    max_examples=1000,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    report_multiple_bugs=False,
)


@FUZZ
@given(replaced())
@pytest.mark.slow
def test_what_is_malformed_is_refused_and_what_is_not_gives_the_right_result(example):
    name, chosen = example
    assert flaw(name, chosen) is None


@pytest.mark.slow
@settings(FUZZ, max_examples=10_000)
@given(replaced())
def test_ten_times_as_many(example):
    name, chosen = example
    assert flaw(name, chosen) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_every_case_of_every_argument(name):
    flaws = {
        f"{argument}={case}": found
        for argument, right in CALLS[name].arguments.items()
        for case in right.cases
        if (found := flaw(name, {argument: case}))
    }
    assert not flaws


@pytest.mark.parametrize("make", [probae.PPCA, probae.FactorAnalysis, probae.Independent, probae.nn.MLP])
@pytest.mark.parametrize("sizes", [(2**30, 2**29), (2**31 - 1, 2**31 - 1)])
def test_sizes_that_do_not_fit_into_memory_together_are_refused(make, sizes):
    with pytest.raises(ValueError, match=f"{make.__name__}: expected sizes that fit into memory"):
        make(*sizes)
