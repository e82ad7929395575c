"Keyed randomness: a sample's numbers depend on its key alone, have the right law, and neighbours share nothing."
import itertools, math, pickle
import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils.data import DataLoader, Dataset
from diffnb.rng import NORMAL, UNIFORM, Rng, cpu_rows, device_rows, philox, words

CPU = torch.device('cpu')
DTYPES = torch.float64, torch.float32, torch.bfloat16, torch.float16
SHAPES = [(), (1,), (2,), (7,), (16,), (17,), (32,), (33,), (3, 8, 8), (64, 5)]
DRAWS = {'normal': lambda r, *s: r.normal(*s), 'normal64': lambda r, *s: r.normal(*s, dtype=torch.float64),
         'uniform': lambda r, *s: r.uniform(*s), 'uniform32': lambda r, *s: r.uniform(*s, dtype=torch.float32),
         'integers': lambda r, *s: r.integers(10, *s), 'gumbel': lambda r, *s: r.gumbel(*s),
         'bernoulli': lambda r, *s: r.bernoulli(torch.full(s, .3))}

def counters(n):
    c = np.zeros((n, 4), np.uint64); c[:, 0] = np.arange(1, n + 1)
    return c

@pytest.mark.parametrize('seed', range(4))
def test_philox_is_numpys(seed):
    k = np.random.default_rng(seed).integers(0, 2**64, 2, dtype=np.uint64)
    assert (philox(counters(500), k) == np.random.Philox(key=k).random_raw(2000).reshape(-1, 4)).all()

def test_philox_known_answers():
    "Random123's kat_vectors: counters and keys of all zeros, of all ones."
    ones = np.uint64(2**64 - 1)
    for fill, want in ((0, '16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b'),
                       (ones, '87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0')):
        got = philox(np.full((1, 4), fill, np.uint64), np.full(2, fill, np.uint64))[0]
        assert ' '.join(f'{w:016x}' for w in got) == want

def test_golden():
    "The numbers themselves: if these change, every seeded result of the library changes."
    r = Rng(7).at('train', step=3).of([0, 41, 2**63 - 1])
    assert r.torch_seed() == GOLDEN['seed']
    for k in ('uniform', 'normal', 'integers'):
        assert DRAWS[k](r, 3, 2).double().flatten().tolist() == pytest.approx(GOLDEN[k], abs=1e-6)
    assert r.permutation(8).tolist() == GOLDEN['permutation']

GOLDEN = {'seed': 253459227709986337,
          'uniform': [0.899732215, 0.932022303, 0.456445264, 0.343089923, 0.499783487, 0.57180771],
          'normal': [0.6325988, 0.8724867, -0.6068916, -0.3830342, 0.5194954, -0.9338133],
          'integers': [8, 9, 4, 3, 4, 5],
          'permutation': [6, 1, 7, 2, 4, 0, 5, 3]}

@pytest.mark.parametrize('name', DRAWS)
@pytest.mark.parametrize('shape', SHAPES, ids=str)
def test_same_in_any_batch(name, shape):
    "Alone, in any split, in any order, repeated, in a large batch: the same bits."
    draw, r = DRAWS[name], Rng(3, 'x', 9)
    whole = draw(r, 150, *shape)
    assert torch.equal(whole, draw(r, 150, *shape))
    for i in (0, 1, 97, 149): assert torch.equal(draw(r.of([i]), 1, *shape)[0], whole[i])
    for split in ([1, 149], [101, 49], [3, 5, 142], [75, 75]):
        assert torch.equal(torch.cat([draw(r.of(p), len(p), *shape) for p in torch.arange(150).split(split)]), whole)
    order = torch.tensor([149, 3, 3, 0, 77])
    assert torch.equal(draw(r.of(order), 5, *shape), whole[order])

@pytest.mark.parametrize('law', [NORMAL, UNIFORM], ids=['normal', 'uniform'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize('n', [1, 15, 16, 17, 700])
def test_other_devices_twin(law, dtype, n):
    "The path of other devices, with the CPU's own generator."
    r, idx = Rng(3, 'x', 9), [8, 0, 2**63 - 1, 4, 4]
    make = lambda r, i: device_rows(r, law, i, n, dtype, CPU)
    whole = make(r, idx)
    assert whole.dtype == dtype and whole.shape == (5, n)
    assert torch.equal(whole, torch.cat([make(r, idx[:2]), make(r, idx[2:])]))
    assert torch.equal(whole[3], whole[4]) and not torch.equal(whole[0], whole[1])
    for other in (Rng(4, 'x', 9), Rng(3, 'y', 9), Rng(3, 'x', 8)): assert not torch.equal(whole, make(other, idx))

def test_other_devices_law():
    for law, ref in ((NORMAL, stats.norm), (UNIFORM, stats.uniform)):
        x = device_rows(Rng(0), law, range(300), 300, torch.float64, CPU)
        assert stats.kstest(x.flatten(), ref.cdf).pvalue > 1e-3
        first = device_rows(Rng(0), law, range(20_000), 1, torch.float64, CPU)  # across samples, not along one
        assert stats.kstest(first.flatten(), ref.cdf).pvalue > 1e-3

class Noisy(Dataset):
    def __len__(self): return 24
    def __getitem__(self, i): return i, Rng(1).at('aug', step=2).of([i]).normal(1, 40)[0]

@pytest.mark.parametrize('workers', [0, 1, 2])
def test_workers(workers):
    whole = Rng(1).at('aug', step=2).normal(24, 40)
    for i, x in DataLoader(Noisy(), batch_size=5, num_workers=workers): assert torch.equal(x, whole[i])

def test_global_state_is_left_alone():
    torch.manual_seed(0); np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    r = Rng(0)
    for d in DRAWS.values(): d(r, 5, 40)
    r.permutation(10); device_rows(r, NORMAL, [0], 20, torch.float32, CPU)
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()

@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('row', [1, 9, 1000])
def test_kolmogorov_smirnov(dtype, row):
    "Along rows and across them. Halves are a grid: the float32 draw behind them is tested by its rounding."
    n = 200_000//row
    r = Rng(11, f'ks{row}')
    z, u = r.normal(n, row, dtype=dtype), r.uniform(n, row, dtype=dtype)
    if dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(z, r.normal(n, row).to(dtype))
        return
    assert stats.kstest(z.flatten().double(), stats.norm.cdf).pvalue > 1e-3
    assert stats.kstest(u.flatten().double(), stats.uniform.cdf).pvalue > 1e-3
    assert stats.kstest(r.gumbel(n, row).flatten(), stats.gumbel_r.cdf).pvalue > 1e-3

def test_ks_across_every_part_of_the_key():
    "The first number under 4000 neighbouring seeds, steps, streams and indices is again normal."
    n = 4000
    first = {'seed': torch.cat([Rng(s).normal(1, 2)[:, 0] for s in range(n)]),
             'step': torch.cat([Rng(0).at(step=s).normal(1, 2)[:, 0] for s in range(n)]),
             'stream': torch.cat([Rng(0, str(s)).normal(1, 2)[:, 0] for s in range(n)]),
             'idx': Rng(0).normal(n, 2)[:, 0], 'pair': Rng(0).normal(n, 2)[:, 1]}
    for x in first.values(): assert stats.kstest(x.double(), stats.norm.cdf).pvalue > 1e-3

@pytest.mark.parametrize('kind', ['normal', 'uniform'])
def test_neighbours_are_uncorrelated(kind):
    "Neighbouring seeds, steps, streams, indices, and the same key at other laws: correlations are 1/sqrt(n) noise."
    n = 8192
    keys = [Rng(s) for s in range(20)] + [Rng(0, step=s) for s in range(1, 20)] + [Rng(0, f's{s}') for s in range(20)]
    keys += [Rng(0, 'i').of([i]) for i in [*range(20), *(2**k for k in range(5, 63, 6)), 2**63 - 1]]
    rows = [getattr(k, kind)(1, n, dtype=torch.float64) for k in keys]
    rows.append(Rng(0).uniform(1, n) if kind == 'normal' else Rng(0).normal(1, n, dtype=torch.float64))
    x = torch.cat(rows)
    x = (x - x.mean(1, keepdim=True))/x.std(1, keepdim=True)
    for y in (x, x.abs()):
        off = torch.corrcoef(y)[~torch.eye(len(y), dtype=torch.bool)]*n**.5
        assert abs(off.std() - 1) < .05 and off.abs().max() < 5.5
    assert ((x[:, 1:]*x[:, :-1]).mean(1)*n**.5).abs().max() < 5  # along a row

def test_pairs_of_box_muller_are_independent():
    "Sums of squares of neighbours are exponential, angles uniform: both fail if sine and cosine met different radii."
    z = Rng(5).normal(50_000, 2, dtype=torch.float64)
    assert stats.kstest((z**2).sum(1)/2, stats.expon.cdf).pvalue > 1e-3
    assert stats.kstest(torch.atan2(z[:, 0], z[:, 1])/(2*math.pi) + .5, stats.uniform.cdf).pvalue > 1e-3

@pytest.mark.parametrize('name', ['uniform', 'normal', 'normal64', 'gumbel'])
def test_a_row_begins_like_a_longer_one(name):
    "Pads behind a text do not change its draws."
    longest = DRAWS[name](Rng(2), 120, 200)
    for n in (1, 2, 3, 31, 32, 33, 64, 131): assert torch.equal(DRAWS[name](Rng(2), 120, n), longest[:, :n])

@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_open_interval(dtype, monkeypatch):
    "The least and the greatest words there are stay inside (0,1), and so does a million of them."
    u = Rng(0).uniform(1000, 1000, dtype=dtype)
    assert u.min() > 0 and u.max() < 1 and u.dtype == dtype
    for w in (0, 2**64 - 1, 2**64 - 2**11):
        monkeypatch.setattr('diffnb.rng.words', lambda rng, law, idx, n: np.full((len(idx), n), w, np.uint64))
        assert ((u := Rng(0).uniform(3, 5, dtype=dtype)) > 0).all() and (u < 1).all()
        assert Rng(0).gumbel(3, 5).isfinite().all() and Rng(0).normal(3, 5, dtype=dtype).isfinite().all()

def test_normal_tails(monkeypatch):
    for dtype, top in ((torch.float32, 6.7), (torch.float64, 9.4)):
        monkeypatch.setattr('diffnb.rng.words', lambda rng, law, idx, n: np.zeros((len(idx), n), np.uint64))
        assert Rng(0).normal(1, 2, dtype=dtype).max() > top

def test_gumbel_reaches_beyond_float32():
    r = Rng(0).at('tail').of([49_170_916])
    assert 21.8 < r.gumbel(1).item() < 21.9
    u = r.uniform(1)
    assert 1 - u.item() < 2.**-31 and r.gumbel(like=torch.zeros(1, dtype=torch.float16)).dtype == torch.float64

def test_gumbel_race_draws_rare_tokens():
    "65,536 rare tokens of total mass 1e-3. The best rare one of a draw is Gumbel + log 65536: race the maxima."
    v, mass, n = 65_536, 1e-3, 400_000
    r = Rng(4)
    best = -(-(r.at('rare').uniform(n).log()/v)).log()   # the maximum of v Gumbels, by its own quantile function
    won = best + math.log(mass/v) > r.at('common').gumbel(n) + math.log(1 - mass)
    assert abs(won.double().mean() - mass) < .1*mass*2
    capped = best.clamp(max=16.64)                        # what a float32 race could reach
    assert (capped + math.log(mass/v) > r.at('common').gumbel(n) + math.log(1 - mass)).double().mean() < mass/3

def test_integers():
    x = Rng(0).integers(6, 600, 100)
    assert x.dtype == torch.int64 and x.shape == (600, 100)
    assert stats.chisquare(x.flatten().bincount(minlength=6)).pvalue > 1e-3 and x.max() == 5 and x.min() == 0
    assert (Rng(0).integers(1, 50) == 0).all()
    assert Rng(0).integers(2**53, 1000).max() < 2**53
    for bad in (0, -1, 2**53 + 1): pytest.raises(ValueError, Rng(0).integers, bad, 4)
    pytest.raises(TypeError, Rng(0).integers, 2.5, 4)

def test_integers_never_reach_high(monkeypatch):
    monkeypatch.setattr('diffnb.rng.words', lambda rng, law, idx, n: np.full((len(idx), n), 2**64 - 1, np.uint64))
    for h in (1, 2, 3, 10, 1000, 50_257, 2**31 - 1, 2**53 - 1, 2**53): assert Rng(0).integers(h, 1).item() == h - 1

def test_bernoulli():
    p = torch.linspace(0, 1, 11).repeat(4000, 1)
    b = Rng(0).bernoulli(p)
    assert b.dtype == torch.bool and not b[:, 0].any() and b[:, -1].all()
    assert ((b.double().mean(0) - p[0])/(.25/4000)**.5).abs().max() < 4
    for bad in ([1.1], [-.1], [math.nan]):
        with pytest.raises(ValueError, match=r'\[0,1\]'): Rng(0).bernoulli(torch.tensor(bad))

def test_permutation():
    p = Rng(0).at('order', step=1).permutation(10_000)
    assert p.dtype == torch.int64 and torch.equal(p.sort().values, torch.arange(10_000))
    assert not torch.equal(p, Rng(0).at('order', step=2).permutation(10_000))
    assert Rng(0).permutation(0).shape == (0,) and Rng(0).permutation(1).tolist() == [0]
    orders = [tuple(Rng(0).at(step=s).permutation(3).tolist()) for s in range(3000)]
    assert stats.chisquare([orders.count(o) for o in itertools.permutations(range(3))]).pvalue > 1e-3
    assert torch.equal(Rng(0).of([5]).permutation(9), Rng(0).permutation(9))

def test_like_dtype_device():
    r = Rng(0)
    for dtype in DTYPES:
        x = torch.zeros(3, 4, 5, dtype=dtype)
        for z in (r.normal(like=x), r.uniform(like=x)): assert z.shape == x.shape and z.dtype == dtype
    x = torch.zeros(3, 4, dtype=torch.float64)
    assert r.normal(3, 4).dtype == torch.float32 and r.uniform(3, 4).dtype == torch.float64
    assert r.normal(7, like=x).shape == (7,) and r.normal(like=x, dtype=torch.float32).dtype == torch.float32
    assert torch.equal(r.normal(like=x), r.normal(3, 4, dtype=torch.float64))
    assert torch.equal(r.uniform(like=x.float()), r.uniform(3, 4).float())

@pytest.mark.parametrize('shape', [(0,), (0, 3), (4, 0), (200, 0), (0, 0), (0, 100)], ids=str)
def test_empty(shape):
    for d in DRAWS.values(): assert d(Rng(0), *shape).shape == shape
    assert Rng(0).of([]).normal(0, 3).shape == (0, 3)
    assert device_rows(Rng(0), NORMAL, [], 3, torch.float32, CPU).shape == (0, 3)

def test_errors_say_what_is_wrong():
    r, x = Rng(0), torch.zeros(4)
    with pytest.raises(ValueError, match='4 rows.* 3 sample'): r.of([1, 2, 3]).normal(4)
    with pytest.raises(ValueError, match='sample index.* -1'): r.of([0, -1])
    with pytest.raises(ValueError, match='-2'): r.of(torch.tensor([1, -2]))
    with pytest.raises(ValueError, match='9223372036854775808'): r.of([2**63])
    with pytest.raises(ValueError, match='first dimension is the batch'): r.normal()
    with pytest.raises(ValueError, match='first dimension is the batch'): r.normal(like=torch.tensor(1.))
    with pytest.raises(TypeError, match='int64.*dtype='): r.normal(like=x.long())
    with pytest.raises(ValueError, match='seed'): Rng(-1)
    with pytest.raises(ValueError, match='step'): r.at(step=-1)

def test_wrong_types():
    "What the annotations forbid is refused with or without their check."
    for bad in (lambda: Rng(0).of([.5]), lambda: Rng(0).of(3), lambda: Rng(0).of(torch.tensor([.5])), lambda: Rng(1.5),
                lambda: Rng(0, 3), lambda: Rng(0).at(step='a')):
        with pytest.raises(Exception) as e: bad()
        assert isinstance(e.value, TypeError) or 'hint' in str(e.value) or 'type' in str(e.value).lower()

def test_a_key_is_a_value():
    r = Rng(3).at('a').at('b', step=2)
    assert r == Rng(3, 'a/b', 2) and hash(r) == hash(Rng(3, 'a/b', 2))
    assert pickle.loads(pickle.dumps(r.of(range(3)))) == r.of(torch.arange(3)) == r.of(np.arange(3)) == r.of([0, 1, 2])
    assert r.of([4]).at('c').idx == (4,) and r.at() == r
    with pytest.raises(Exception): r.seed = 4

def test_no_two_keys_are_alike():
    "Streams, steps and nesting never spell the same key, and an outer step is never forgotten."
    keys = [Rng(s, n, t) for s in (0, 1, 12) for n in ('', 'a', 'a1', 'a/1', '1') for t in (0, 1, 2, 12)]
    keys += [Rng(0).at('a', step=o).at('b', step=i) for o in range(1, 4) for i in range(3)]
    assert len({tuple(k.key()) for k in keys}) == len(keys) == len({k.torch_seed() for k in keys})
    assert all(0 <= k.torch_seed() < 2**63 for k in keys)
    assert Rng(0).at('a').at('b') == Rng(0, 'a/b') and Rng(0).at('a', step=0).at('b', step=1) == Rng(0, 'a/b', 1)

def test_words_are_made_alike_in_both_ways():
    for n in (1, 4, 5, 32):
        many = words(Rng(6), 2, range(101), n)
        assert (many == words(Rng(6), 2, range(101), 33)[:, :n]).all()
        assert (many[50:] == words(Rng(6), 2, range(50, 101), n)).all()

def test_forms_of_rows():
    assert cpu_rows(Rng(0), NORMAL, range(3), 7, torch.float32, CPU).is_contiguous()
    x = Rng(0).normal(3, 3, 5, 5)
    assert x.is_contiguous() and not x.requires_grad
    x.add_(1)  # the caller's own memory, and nobody else's
    assert not torch.equal(x, Rng(0).normal(3, 3, 5, 5))
