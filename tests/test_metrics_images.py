"Image metrics against closed forms, other libraries and hand-made sets; records; the judge that ships; Inception; CLIP score."
import dataclasses, hashlib, itertools, json, math
from importlib.resources import files
import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from diffnb.core import presets
from diffnb.data.images import fashion_mnist, once, to_float, to_uint8
from diffnb.metrics.features import (FashionFeatures, accuracy, clip_score, consistency, fashion_features, fid10k, fid50k,
                                     inception, keyed_init, read_weights, train_fashion_features)
from diffnb.metrics.images import (BLOCK, Extractor, Moments, Normal, Record, Seen, compare, fid, fid_infinity, frechet,
                                   inception_score, kid, look, mmd2, precision, radii2, recall, recipe, score, sfid)
from diffnb.rng import Rng
from diffnb.store import load_tensors, save_tensors

def cloud(n, d, seed=0, scale=1.): return scale*Rng(seed, 'cloud').normal(n, d)

def gather(*parts):
    m = Moments()
    for p in parts: m.add(p)
    return m.normal()

FLAT = Extractor('pixels', lambda im: im.flatten(1).float())
def seen(x, logits=None, extractor=FLAT): return Seen(extractor, len(x), hashlib.sha256(x.numpy().tobytes()).hexdigest()[:16], gather(x), x, logits)

def byte_images(n, size=3, seed=0): return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, 1, size, size), np.uint8))

# --- moments ---
@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(1, 1400), max_size=6), n=st.integers(2, 1500))
def test_moments_do_not_depend_on_batches(cuts, n):
    x = cloud(n, 3)+50
    whole = gather(x)
    parts = gather(*torch.tensor_split(x, sorted({c for c in cuts if c<n})))
    assert parts.n==n and torch.equal(whole.mean, parts.mean) and torch.equal(whole.cov, parts.cov)

@pytest.mark.parametrize('n', [2, BLOCK-1, BLOCK, BLOCK+1, 3*BLOCK, 3*BLOCK+7])
def test_moments_are_right(n):
    x = cloud(n, 4)
    m = gather(x)
    assert np.allclose(m.mean, x.double().numpy().mean(0), atol=1e-13)
    assert np.allclose(m.cov, np.cov(x.double().numpy(), rowvar=False), atol=1e-12)

def test_moments_keep_their_digits():
    "An offset of 1e4 would cost sums of squares eight digits."
    x = cloud(3000, 4).double()
    assert (gather(x+1e4).cov-gather(x).cov).abs().max()<1e-9

def test_moments_keep_few_rows():
    m = Moments()
    for _ in range(30):
        m.add(cloud(100, 3))
        assert sum(map(len, m.rest))<1000
    assert len(m)==3000

def test_asking_for_moments_changes_nothing():
    m, x = Moments(), cloud(700, 3)
    m.add(x[:600]); m.normal(); m.add(x[600:])
    assert torch.equal(m.normal().cov, gather(x).cov)
    with pytest.raises(ValueError, match='two images'): gather(x[:1])

# --- Fréchet ---
def spd(d, rank, seed): a = cloud(d, rank, seed).double(); return a@a.T/rank

@pytest.mark.parametrize('d,rank', [(1, 1), (5, 5), (5, 2), (40, 50), (40, 7)])
def test_frechet_is_the_formula_with_scipys_root(d, rank):
    a, b = (Normal(100, cloud(d, 1, s).double()[:, 0], spd(d, rank, s)) for s in (1, 2))
    root = scipy.linalg.sqrtm((a.cov@b.cov).numpy())
    want = ((a.mean-b.mean)**2).sum().item()+np.trace(a.cov+b.cov)-2*np.trace(root.real)
    assert abs(frechet(a, b)-want)<1e-5*max(1, abs(want)) and abs(frechet(a, b)-frechet(b, a))<1e-8*max(1, want)
    assert frechet(a, a)<1e-6*d

def test_frechet_closed_forms():
    d = 6
    s, t, m = (cloud(1, d, k).double()[0].abs() for k in range(3))
    zero = torch.zeros(d).double()
    assert abs(frechet(Normal(9, zero, torch.diag(s**2)), Normal(9, m, torch.diag(t**2)))-((m**2).sum()+((s-t)**2).sum()).item())<1e-10
    c = spd(d, 9, 3)
    assert abs(frechet(Normal(9, zero, c), Normal(9, zero, 4*c))-c.trace().item())<1e-9   # sqrt(4cc) = 2c: 5 tr - 4 tr
    with pytest.raises(ValueError, match='6 and of 5'): frechet(Normal(9, zero, c), Normal(9, zero[:5], c[:5, :5]))

def test_frechet_agrees_with_torch_fidelity():
    ref = pytest.importorskip('torch_fidelity.metric_fid')
    x, y = cloud(300, 20, 1).double(), (cloud(400, 20, 2)@cloud(20, 20, 3)).double()
    want = ref.fid_statistics_to_metric(ref.fid_features_to_statistics(x), ref.fid_features_to_statistics(y), False)['frechet_inception_distance']
    assert abs(frechet(gather(x), gather(y))-want)<1e-8*want

def test_frechet_of_few_is_refused_or_marked():
    a, b = look([byte_images(9)], FLAT), look([byte_images(500, seed=1)], FLAT)   # 9 images, 9 features
    for x,y in ((a, b), (b, a)):
        with pytest.raises(ValueError, match='fid of 9 images with 9 features'): fid(x, y)
        assert fid(x, y, force=True).forced and 'too few' in str(fid(x, y, force=True))
    assert not fid(look([byte_images(10)], FLAT), b).forced
    with pytest.raises(ValueError, match='fid_infinity of 18'): fid_infinity(look([byte_images(18)], FLAT), b)

def test_bias_is_extrapolated_away():
    "Both from one Gaussian, whose distance to itself is 0."
    d = 10
    exact = seen(cloud(100, d))
    exact = dataclasses.replace(exact, normal=Normal(10**9, torch.zeros(d).double(), torch.eye(d).double()))
    pools = [seen(cloud(1000, d, k)) for k in range(8)]
    limit, plain = (np.mean([m(s, exact).value for s in pools]) for m in (fid_infinity, fid))
    assert abs(limit)<.3*plain

# --- KID ---
@settings(max_examples=15, deadline=None)
@given(n=st.integers(2, 7), m=st.integers(2, 7), d=st.integers(1, 5))
def test_mmd_is_the_double_loop(n, m, d):
    x, y = cloud(n, d, 1).double(), cloud(m, d, 2).double()
    k = lambda a, b: ((a*b).sum().item()/d+1)**3
    xx = sum(k(x[i], x[j]) for i,j in itertools.permutations(range(n), 2))/(n*(n-1))
    yy = sum(k(y[i], y[j]) for i,j in itertools.permutations(range(m), 2))/(m*(m-1))
    want = xx+yy-2*sum(k(a, b) for a in x for b in y)/(n*m)
    assert abs(mmd2(x, y)-want)<1e-9*max(1, abs(want))

def test_kid_agrees_with_torch_fidelity():
    ref = pytest.importorskip('torch_fidelity.metric_kid')
    x, y = cloud(50, 8, 1).double(), cloud(50, 8, 2).double()*1.2
    kw = dict(kid_kernel='poly', kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1)
    k = [ref.kernel_poly(a.numpy(), b.numpy(), **kw) for a,b in ((x, x), (x, y), (y, y))]
    assert abs(mmd2(x, y)-ref.mmd2(*k))<1e-10

def test_kid_is_unbiased_and_keyed():
    v = torch.tensor([mmd2(cloud(20, 4, 2*s).double(), cloud(20, 4, 2*s+1).double()) for s in range(400)])
    assert abs(v.mean())<4*v.std()/20 and (v<0).float().mean()>.3
    a, b = seen(cloud(200, 4, 1)), seen(cloud(300, 4, 2))
    r = kid(a, b, subsets=5, size=100)
    assert r==kid(a, b, subsets=5, size=100) and r.sd>0 and r.value!=kid(a, b, subsets=5, size=100, seed=1).value
    assert 'size=200' in kid(a, b, subsets=2).params                                # no more than there are
    whole = kid(a, seen(cloud(200, 4, 2)), subsets=1)
    assert abs(whole.value-mmd2(a.x.double(), cloud(200, 4, 2).double()))<1e-9 and whole.sd is None

# --- Inception score ---
def test_inception_score_limits():
    for k in (2, 10):
        sure = torch.full((10*k, k), -1e9); sure[torch.arange(10*k), torch.arange(10*k)%k] = 0
        assert abs(score(sure)-k)<1e-9
        r = inception_score(seen(cloud(10*k, 2), sure), splits=5)
        assert abs(r.value-k)<1e-9 and r.sd<1e-9 and r.reference==''
    assert abs(score(cloud(1, 5).expand(30, -1))-1)<1e-9 and score(cloud(50, 5))>1
    with pytest.raises(ValueError, match='no logits'): inception_score(seen(cloud(9, 2)))
    with pytest.raises(ValueError, match='10 parts of 9'): inception_score(seen(cloud(9, 2), cloud(9, 3)))

def test_inception_score_agrees_with_torch_fidelity():
    ref = pytest.importorskip('torch_fidelity.metric_isc')
    z = cloud(200, 7, scale=2.)
    want = ref.isc_features_to_metric(z, splits=4, shuffle=False)
    r = inception_score(seen(cloud(200, 2), z), splits=4)
    assert abs(r.value-want['inception_score_mean'])<1e-5
    assert abs(r.sd*math.sqrt(3/4)-want['inception_score_std'])<1e-5                # theirs divides by n, ours by n-1

# --- precision and recall ---
def line(*v): return seen(torch.tensor([[float(o)] for o in v]))

@pytest.mark.parametrize('samples,real,k,p,r', [
    ([0, 1, 2, 3], [0, 1, 2, 3], 1, 1, 1),
    ([10, 11, 12], [0, 1, 2, 3], 1, 0, 0),
    ([0, .1, .2], [0, 1, 2, 3], 1, 1, 1/4),           # all good, and all alike
    ([0, 1.5, 3, 50], [0, 1, 2, 3], 1, 3/4, 1),       # one bad
    ([4.01], [0, 1, 2, 3], 1, 0, None),               # just outside of the last ball
    ([4.01], [0, 1, 2, 3], 2, 1, None)])              # a neighbour further, it is inside
def test_precision_recall_by_hand(samples, real, k, p, r):
    x = line(*samples, *samples) if len(samples)==1 else line(*samples)                # moments want two
    assert abs(precision(x, line(*real), k=k).value-p)<1e-9
    if r is not None: assert abs(recall(line(*samples), line(*real), k=k).value-r)<1e-9

def test_precision_recall_by_brute_force():
    x, y, k = cloud(70, 6, 1), cloud(90, 6, 2)+.8, 3
    def inside(p, centres):
        d = np.linalg.norm(centres[:, None]-centres[None], axis=-1)
        radius = np.sort(d, 1)[:, k]
        return np.mean([(np.linalg.norm(o-centres, axis=1)<=radius).any() for o in p])
    a, b = x.double().numpy(), y.double().numpy()
    assert .1<inside(b, a)<.9 and .1<inside(a, b)<.9
    assert abs(precision(seen(x), seen(y)).value-inside(a, b))<1e-12 and abs(recall(seen(x), seen(y)).value-inside(b, a))<1e-12

def test_precision_in_chunks_and_with_few():
    x = cloud(2500, 2, 1).double()
    assert torch.equal(radii2(x, 3), torch.cdist(x, x).kthvalue(4, 1).values**2)
    with pytest.raises(ValueError, match='3 neighbours among 3'): precision(seen(cloud(9, 2)), seen(cloud(3, 2)))

# --- looking ---
def test_look_names_the_images():
    x = byte_images(40)
    a, b = look([x], FLAT), look(x.split(7), FLAT)
    assert a.id==b.id and a.n==40 and torch.equal(a.normal.cov, b.normal.cov) and torch.equal(a.x, b.x)
    y = x.clone(); y[7, 0, 0, 0] ^= 1
    assert len({a.id, look([y], FLAT).id, look([x.flip(0)], FLAT).id, look([x.view(40, 1, 1, 9)], FLAT).id})==4
    assert look(x.split(7), FLAT, keep=10).x.shape==(10, 9) and look(x.split(7), FLAT, keep=10).normal.n==40

def test_look_refuses():
    with pytest.raises(TypeError, match='to_uint8'): look(iter([byte_images(4).float()]), FLAT) # an iterator: the type check cannot see into it
    with pytest.raises(ValueError, match='in one set'): look([byte_images(4), byte_images(4, 5)], FLAT)
    with pytest.raises(ValueError, match='not finite'): look([byte_images(4)], Extractor('nan', lambda im: im.flatten(1)/0.))
    with pytest.raises(ValueError): look([], FLAT)
    with pytest.raises(ValueError, match='no feature maps'): sfid(seen(cloud(9, 2)), seen(cloud(9, 2)))

# --- records ---
def test_records_are_plain_and_come_back():
    r = fid(look([byte_images(50)], FLAT), look([byte_images(60, seed=1)], FLAT))
    assert Record(**json.loads(json.dumps(dataclasses.asdict(r))))==r and '50 images against 60' in str(r)

@pytest.mark.parametrize('field,value', [('metric', 'kid'), ('extractor', 'other'), ('weights', 'ff'), ('resize', 'bilinear'), ('dtype', 'float64'),
    ('n', 51), ('reference', 'ab'), ('n_reference', 61), ('params', 'k=4'), ('forced', True)])
def test_unlike_records_are_not_compared(field, value):
    r = fid(look([byte_images(50)], FLAT), look([byte_images(60, seed=1)], FLAT))
    with pytest.raises(ValueError, match=f'cannot be compared .*{field}'): compare(r, dataclasses.replace(r, **{field: value}))
    assert field in recipe(r)

def test_like_records_are_compared():
    ref = look([byte_images(60, seed=1)], FLAT)
    a, b = (fid(look([byte_images(50, seed=s)], FLAT), ref) for s in (0, 2))
    assert a.samples!=b.samples and compare(a, b)==a.value-b.value

@pytest.mark.parametrize('field', ['name', 'weights', 'resize', 'dtype'])
def test_samples_and_reference_have_one_judge(field):
    other = dataclasses.replace(FLAT, **{field: 'other'})
    for metric in (fid, kid, precision, recall):
        with pytest.raises(ValueError, match='samples and reference differ'): metric(look([byte_images(50)], FLAT), look([byte_images(60)], other))

def test_metric_presets():
    assert {'fid', 'sfid', 'kid', 'inception_score', 'precision', 'recall', 'fid10k', 'fid50k', 'fid_infinity'}<=set(presets('metric'))

def test_fid50k_counts():
    big = seen(cloud(10_000, 2))
    assert fid10k(big, big).metric=='fid10k'
    with pytest.raises(ValueError, match='fid50k takes 50000 samples, and these are 10000'): fid50k(big, big)

# --- the judge that ships ---
@pytest.fixture(scope='module')
def judge(): return fashion_features()

@pytest.fixture(scope='module')
def test_set(): return fashion_mnist('test')

def test_judge_ships(judge, test_set):
    path = files('diffnb')/'trained'/'fashion_features.safetensors'
    meta = load_tensors(path)[1]
    assert path.stat().st_size<400_000 and judge.weights==hashlib.sha256(path.read_bytes()).hexdigest()
    assert meta['test_accuracy']>=.9 and meta['made_by']=='train_fashion_features(fashion_mnist_full())'
    s = look(once(test_set), judge)
    assert s.x.shape==(1000, 64) and s.logits.shape==(1000, 10) and len(s.maps.mean)==343
    r = consistency(s, test_set.labels)
    assert abs(r.value-meta['test_accuracy'])<.03 and r.value==consistency(s, test_set.labels).value
    with pytest.raises(ValueError, match='3 labels for 1000'): consistency(s, test_set.labels[:3])
    with pytest.raises(ValueError, match='no logits'): consistency(seen(cloud(3, 2)), test_set.labels[:3])

def test_judge_does_not_care_for_batches(judge, test_set):
    a, b = (torch.cat([judge(x).x for x in once(test_set, k)]) for k in (1000, 37))
    assert (a-b).abs().max()<1e-3
    three = test_set.pixels[:5].expand(-1, 3, -1, -1)
    assert (judge(three).x-judge(test_set.pixels[:5]).x).abs().max()<1e-4

def test_judge_sees_damage(judge, test_set):
    real, x = look(once(fashion_mnist()), judge), to_float(test_set.pixels)
    def at(s): return fid(look([to_uint8(x+s*Rng(0).normal(like=x))], judge), real).value
    curve = [at(s) for s in (0., .05, .1, .2, .4)]
    assert all(a<b for a,b in zip(curve, curve[1:])) and curve[1]>2*curve[0]
    one = x[test_set.labels==3]
    few = look([to_uint8(one)], judge)
    assert recall(few, real).value<.3 and fid(few, real).value>20*curve[0]

def test_training_the_judge_is_deterministic():
    ds = fashion_mnist().take(torch.arange(600))
    torch.manual_seed(1); a = train_fashion_features(ds, steps=8)
    torch.manual_seed(2); b = train_fashion_features(ds, steps=8)
    for p,q in zip(a.state_dict().values(), b.state_dict().values()): assert torch.equal(p, q)
    c = train_fashion_features(ds, steps=8, rng=Rng(1))
    assert not torch.equal(a.head.weight, c.head.weight) and accuracy(a, ds)>.2

def test_keyed_init_fills_everything():
    net = FashionFeatures()
    for p in net.parameters(): p.data.fill_(float('nan'))
    for n in net.norms: n.reset_parameters()
    keyed_init(net, Rng(0))
    assert all(p.isfinite().all() for p in net.parameters()) and abs(net.features.weight.std()*(576/2)**.5-1)<.02

@pytest.mark.slow
def test_the_recipe_makes_the_judge_that_ships():
    from diffnb.data.images import fashion_mnist_full
    net = train_fashion_features(fashion_mnist_full())
    ours = FashionFeatures(); ours.load_state_dict(load_tensors(files('diffnb')/'trained'/'fashion_features.safetensors')[0])
    test = fashion_mnist_full(split='test')
    assert abs(accuracy(net, test)-accuracy(ours, test))<.01

# --- Inception, with random weights in the exact format ---
@pytest.fixture(scope='module')
def random_inception(tmp_path_factory):
    fe = pytest.importorskip('torch_fidelity.feature_extractor_inceptionv3')
    was, fe.load_state_dict_from_url = fe.load_state_dict_from_url, lambda *a, **k: None
    plain, nn.Module.load_state_dict = nn.Module.load_state_dict, lambda self, *a, **k: None
    try: net = fe.FeatureExtractorInceptionV3('x', ['2048', 'logits_unbiased'])
    finally: fe.load_state_dict_from_url, nn.Module.load_state_dict = was, plain
    d = tmp_path_factory.mktemp('inception')
    g = torch.Generator().manual_seed(0)
    tensors = {k: v.clone() for k,v in net.state_dict().items()}
    for k,v in tensors.items():
        if v.ndim>1: v.copy_(torch.randn(v.shape, generator=g)*(2/v[0].numel())**.5)
    net.load_state_dict(tensors)
    torch.save(tensors, d/'w.pth')
    save_tensors(d/'w.safetensors', tensors)
    return net, d

def test_inception_is_torch_fidelitys(random_inception):
    net, d = random_inception
    im = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 32, 32), np.uint8))
    x, logits = net(im)
    for f in ('w.pth', 'w.safetensors'):
        e = inception(str(d/f), sha256='')
        out = e(im)
        assert torch.equal(out.x, x) and torch.equal(out.logits, logits) and out.maps.shape==(2, 2023)
        assert e.weights==hashlib.sha256((d/f).read_bytes()).hexdigest() and e.name=='inception-v3-compat'
    got = []
    net.Mixed_6d.branch1x1.register_forward_hook(lambda m, i, o: got.append(o)); net(im)
    assert torch.equal(out.maps, got[0][:, :7].reshape(2, -1)) and got[0].shape[-2:]==(17, 17)
    assert torch.equal(e(im[:, :1]).x, e(im[:, :1].expand(-1, 3, -1, -1)).x)         # grey is made colour

def test_inception_refuses(random_inception, tmp_path):
    _, d = random_inception
    with pytest.raises(ValueError, match='not 6726825d: fetch https'): inception(str(d/'w.pth'))
    with pytest.raises(FileNotFoundError, match='Inception is not there'): inception(str(d/'none.pth'))
    class Evil:
        def __reduce__(self): return (open, (str(tmp_path/'ran'), 'w'))
    torch.save(dict(a=Evil()), tmp_path/'evil.pth')
    with pytest.raises(ValueError, match='more than tensors'): inception(str(tmp_path/'evil.pth'), sha256='')
    assert not (tmp_path/'ran').exists()
    (tmp_path/'junk.pth').write_bytes(b'junk')
    with pytest.raises(ValueError, match='more than tensors, or is damaged'): read_weights(tmp_path/'junk.pth')

# --- CLIP score ---
def test_clip_score():
    im = byte_images(6)
    see, read = (lambda x: x.flatten(1).float()-128), (lambda t: torch.stack([table[o] for o in t]))
    table = {str(i): v for i,v in enumerate(see(im))}
    same = clip_score(im.split(4), [str(i) for i in range(6)], see, read)
    assert abs(same.value-100)<1e-4 and same.n==6
    table = {str(i): -v for i,v in enumerate(see(im))}
    assert clip_score([im], [str(i) for i in range(6)], see, read).value==0           # no negative scores
    for n in (5, 7):
        with pytest.raises(ValueError, match=f'{n} texts'): clip_score(im.split(4), ['0']*n, see, read)
    assert same.samples==clip_score([im], [str(i) for i in range(6)], see, read).samples
