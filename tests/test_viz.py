"Pictures are pure functions from numbers to pixels: what is drawn is what was given."
import io, math, subprocess, sys
import matplotlib.pyplot as plt
import numpy as np
import pytest, torch
from matplotlib.colors import to_rgb
from PIL import Image
from diffnb.viz import (artists, buckets, fills, film_strip, loss_by_t, loss_curve, palette, pick_frames, save_png, scrub, show_images,
                        show_points, show_schedules, show_tokens, smooth, style, styled, to_bytes, to_grid, token_names)

@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')

def gen(seed=0): return torch.Generator().manual_seed(seed)

def pixels(ax, **kw):
    buf = io.BytesIO()
    ax.figure.savefig(buf, format='png', **kw)
    return np.asarray(Image.open(buf).convert('RGB'))

# --- images ---
def test_bytes():
    x = torch.tensor([-2., -1., -.5, 0., 1., 3., math.inf, -math.inf]).reshape(1, 2, 4)
    assert to_bytes(x)[0,...,0].flatten().tolist()==[0, 0, 64, 128, 255, 255, 255, 0]
    assert to_bytes(x, 0, 3)[0,...,1].flatten().tolist()==[0, 0, 0, 0, 85, 255, 255, 0]
    u = torch.randint(256, (2, 3, 4, 5), generator=gen(), dtype=torch.uint8)
    assert np.array_equal(to_bytes(u), u.permute(0, 2, 3, 1).numpy())
    grey = to_bytes(u[:,:1])
    assert grey.shape==(2, 4, 5, 3) and (grey==grey[...,:1]).all() and np.array_equal(to_bytes(u[:,0]), grey)
    half = torch.rand(2, 3, 4, 4, generator=gen()).half().requires_grad_()
    assert np.abs(to_bytes(half, 0, 1)/255-half.detach().float().permute(0, 2, 3, 1).numpy()).max()<=.5/255+1e-6

@pytest.mark.parametrize('x,error,word', [
    (torch.zeros(4, 4), ValueError, r'\(4, 4\)'), (torch.zeros(1, 4, 8, 8), ValueError, 'decode'), (torch.zeros(0, 3, 8, 8), ValueError, '0, 3'),
    (torch.zeros(2, 8, 8, dtype=torch.long), TypeError, 'int64'), (torch.full((3, 8, 8), math.nan), ValueError, '3 of 3')])
@pytest.mark.parametrize('f', [to_bytes, to_grid, show_images])
def test_refused_images(f, x, error, word):
    with pytest.raises(error, match=word): f(x)
    assert not plt.get_fignums(), 'refused before drawing'

def test_refused_arguments():
    x = torch.zeros(4, 8, 8)
    with pytest.raises(ValueError, match='below hi'): to_bytes(x, 1, 1)
    for kw in (dict(ncol=0), dict(pad=-1), dict(top=-1)):
        with pytest.raises(ValueError, match='a grid has'): to_grid(x, **kw)
    with pytest.raises(ValueError, match='3 titles for 4'): show_images(x, ncol=2, titles='abc')
    assert not plt.get_fignums()

@pytest.mark.parametrize('b,ncol,pad,top', [(1, 8, 1, 0), (5, 3, 1, 0), (6, 3, 2, 4), (7, 7, 0, 0)])
def test_grid(b, ncol, pad, top):
    "Each image is found where it belongs, and everything else is white."
    x = torch.rand(b, 3, 5, 4, generator=gen())*1.8-1
    g, want = to_grid(x, ncol, pad, top), to_bytes(x)
    cols = min(ncol, b)
    assert g.shape==(math.ceil(b/cols)*(5+pad+top)+pad, cols*(4+pad)+pad, 3)
    rest = np.ones(g.shape[:2], bool)
    for i in range(b):
        r, c = pad+top+i//cols*(5+pad+top), pad+i%cols*(4+pad)
        assert np.array_equal(g[r:r+5,c:c+4], want[i])
        rest[r:r+5,c:c+4] = False
    assert (g[rest]==255).all() and rest.sum()==rest.size-b*20

def test_save(tmp_path):
    x = torch.rand(3, 3, 6, 6, generator=gen())*2-1
    save_png(tmp_path/'a.png', x, ncol=2)
    assert np.array_equal(np.asarray(Image.open(tmp_path/'a.png')), to_grid(x, ncol=2))

@pytest.mark.parametrize('shape,ncol', [((8, 8, 8), 8), ((3, 3, 32, 32), 2), ((1, 1, 64, 64), 8), ((16, 1, 28, 28), 16), ((2, 1, 300, 300), 2)])
@pytest.mark.parametrize('tight', [None, 'tight'])
def test_never_blurred(shape, ncol, tight):
    "Every block of the figure is one value of the grid, as a script saves it and as a notebook does, which cuts and adds 8 pixels."
    x = torch.rand(shape, generator=gen())*2-1
    shot, g = pixels(show_images(x, ncol), bbox_inches=tight), to_grid(x, ncol)
    if tight: shot = shot[8:-8,8:-8]
    k = shot.shape[1]//g.shape[1]
    assert k>=1 and np.array_equal(shot, g.repeat(k, 0).repeat(k, 1))
    if g.shape[1]<80: assert k==6

@pytest.mark.parametrize('titles', [list('abcdef'), list('abc')], ids=['each', 'columns'])
def test_titles(titles):
    "With titles the images stay sharp, and the text is in the room above its own image, on no other."
    x = torch.zeros(6, 8, 8)
    ax = show_images(x, ncol=3, titles=titles)
    shot = pixels(ax)
    plt.close('all')
    bare = ax.images[0].get_array().data
    k = shot.shape[1]//bare.shape[1]
    assert shot.shape[0]==k*bare.shape[0]
    ink = (shot!=bare.repeat(k, 0).repeat(k, 1)).any(2)                # what the text added
    rows = np.flatnonzero(ink.any(1))//k
    assert ink.any() and [o.get_text() for o in ax.texts]==titles
    grey = (bare==128).all(2)                                            # rows and columns of the images
    assert not grey[rows].any()
    if len(titles)==3: assert rows.max()<grey.any(1).argmax()
    for o in ax.texts: assert grey[:,int(o.get_position()[0])].any()

def test_caller_axes():
    _, axs = plt.subplots(1, 2)
    n = len(plt.get_fignums())
    assert show_images(torch.zeros(1, 4, 4), ax=axs[0]) is axs[0] and show_points(torch.zeros(3, 2), ax=axs[1]) is axs[1]
    assert len(plt.get_fignums())==n and axs[0].images[0].get_interpolation()=='nearest'

# --- style ---
def test_style_is_local():
    "A function's style leaves the reader's settings alone, also when it fails; what is set inside for good stays."
    plt.rcParams.update({'font.size': 13, 'figure.dpi': 55})
    before = {k: v for k,v in plt.rcParams.items() if k!='backend'}
    with styled():
        assert plt.rcParams['font.size']==style['font.size']
    show_points(torch.zeros(3, 2)); loss_curve([1., 2.])
    with pytest.raises(ValueError): show_images(torch.zeros(2))
    with pytest.raises(ValueError):
        with styled(): raise ValueError
    assert {k: v for k,v in plt.rcParams.items() if k!='backend'}==before
    old = plt.rcParams['interactive']
    with styled(): plt.rcParams['interactive'] = not old
    assert plt.rcParams['interactive'] is not old, 'a backend sets this when it is first used: without it notebooks show nothing'
    plt.rcParams['interactive'] = old
    plt.rcdefaults()

def contrast(a, b):
    "Contrast ratio of two colours (WCAG 2)."
    def lum(c): return np.dot([.2126, .7152, .0722], [o/12.92 if o<=.03928 else ((o+.055)/1.055)**2.4 for o in to_rgb(c)])
    hi, lo = sorted((lum(a), lum(b)), reverse=True)
    return (hi+.05)/(lo+.05)

def test_colours():
    "Lines can be seen on white, text on its cell; as a person without red or without green cones sees them, colours stay apart."
    assert all(contrast(o, 'white')>2 for o in palette)
    shown = [1-.6*(1-np.array(to_rgb(o))) for o in fills]
    assert all(contrast(o, 'black')>5 for o in shown)
    rgb = np.array([to_rgb(o) for o in palette])
    lms = rgb@np.array([[.31399, .63951, .04650], [.15537, .75789, .08670], [.01776, .10944, .87257]]).T
    for cut in ([[0, 1.05118, -.05116], [0, 1, 0], [0, 0, 1]], [[1, 0, 0], [.95131, 0, .04866], [0, 0, 1]]): # Viénot et al. 1999
        seen = lms@np.array(cut).T
        apart = np.linalg.norm(seen[:,None]-seen[None], axis=-1)[~np.eye(len(palette), dtype=bool)]
        assert apart.min()>.03

# --- points and tokens ---
def test_points():
    x = torch.stack(torch.meshgrid(torch.arange(8.), torch.arange(5.), indexing='ij'), -1).reshape(-1, 2)
    ax = show_points(x, torch.arange(8).repeat_interleave(5))
    assert len(ax.collections)==8 and len({tuple(map(tuple, c.get_paths()[0].vertices)) for c in ax.collections})==8
    got = np.concatenate([c.get_offsets() for c in ax.collections])
    assert np.array_equal(got, x.numpy()) and ax.get_aspect()==1
    assert show_points(x, lim=9).get_xlim()==(-9, 9)
    plt.close('all')
    with pytest.raises(ValueError, match=r'\(3, 3\)'): show_points(torch.zeros(3, 3))
    with pytest.raises(ValueError, match='2 labels for 3'): show_points(torch.zeros(3, 2), torch.zeros(2))
    assert not plt.get_fignums()

@pytest.mark.parametrize('k', range(8))
def test_points_visible(k):
    "A label of many points shows in its colour: small markers of some shapes vanish between pixels."
    shot = pixels(show_points(torch.rand(300, 2, generator=gen()), torch.full((300,), k))).reshape(-1, 3).astype(int)
    near = np.abs(shot-np.array(to_rgb(palette[k]))*255).sum(1)<60
    assert near.sum()>310                                              # plus signs and stars of this size have 105 and 299

def test_tokens():
    x = torch.tensor([[0, 1, 9], [9, 8, 2]])
    conf = torch.tensor([[1., .5, .3], [1., 0., 2.]])
    ax = show_tokens(x, names=[f'w{i}' for i in range(9)], mask_id=9, conf=conf)
    assert [(o.get_text(), o.get_position()) for o in ax.texts]==[('w0', (0, 0)), ('w1', (1, 0)), ('w8', (1, 1)), ('w2', (2, 1))]
    hatched = [tuple(np.add(o.get_xy(), .5)) for o in ax.patches if o.get_hatch()]
    assert hatched==[(2, 0), (0, 1)]
    paint = ax.images[0].get_array()
    tint = lambda i, c: 1-.6*c*(1-np.array(to_rgb(fills[i%8])))
    assert np.allclose(paint[0,0], tint(0, 1)) and np.allclose(paint[0,1], tint(1, .5))
    assert np.allclose(paint[1,1], 1) and np.allclose(paint[1,2], tint(2, 1)) # conf is clipped
    assert [o.get_text() for o in show_tokens(torch.tensor([3, 1])).texts]==['3', '1']
    shot = pixels(show_tokens(torch.tensor([0, 9]), mask_id=9))
    right = shot[4:-4, shot.shape[1]//2+4:-4].astype(int)
    assert np.ptp(right)>40 and np.ptp(right, axis=-1).max()<8, 'a masked cell is hatched, and has no colour'

@pytest.mark.parametrize('x,kw,error,word', [
    (torch.zeros(2, 3), {}, TypeError, 'float32'), (torch.zeros(3, dtype=torch.bool), {}, TypeError, 'bool'),
    (torch.zeros(1, 2, 3, dtype=torch.long), {}, ValueError, '1, 2, 3'), (torch.zeros(0, 3, dtype=torch.long), {}, ValueError, '0, 3'),
    (torch.tensor([0, 3]), dict(names='abc'), ValueError, 'token 3'), (torch.tensor([0, -1]), dict(names='abc'), ValueError, 'token -1'),
    (torch.tensor([0, 3]), dict(conf=torch.ones(3)), ValueError, 'conf')])
def test_refused_tokens(x, kw, error, word):
    with pytest.raises(error, match=word): show_tokens(x, **kw)
    assert not plt.get_fignums()

def test_mask_needs_no_name(): assert token_names(torch.tensor([0, 7]), 'ab', mask_id=7)=={0: 'a'}

# --- schedules ---
def test_schedules():
    "The curves are the formulas; a schedule of many times the data's size gets an axis of its own kind."
    two = {'straight': lambda t: (1-t, t), 'edm': lambda t: (torch.ones(()), 80*t)}
    a, s, l = show_schedules(two)
    t, y = l.lines[0].get_xdata()[1:-1], l.lines[0].get_ydata()[1:-1]
    assert np.allclose(y, 2*np.log((1-t)/t)) and np.allclose(a.lines[0].get_ydata()[1:-1], 1-t) and np.allclose(s.lines[1].get_ydata()[1:-1], 80*t)
    assert [o.get_text() for o in a.get_legend().get_texts()]==list(two) and s.get_yscale()=='symlog'
    assert show_schedules({'a': two['straight']})[1].get_yscale()=='linear'
    plt.close('all')
    with pytest.raises(ValueError, match="'bad'"): show_schedules({'bad': lambda t: (1/t, t)})
    assert not plt.get_fignums()

# --- trajectories ---
def test_frames():
    for N in range(1, 70):
        for n in range(2, 12):
            i = pick_frames(N, n)
            assert i[0]==0 and i[-1]==N-1 and len(i)==min(n, N) and (N<3 or max(np.diff(i))-min(np.diff(i))<=1)
    for bad in ((0, 8), (5, 1)):
        with pytest.raises(ValueError, match='two frames'): pick_frames(*bad)

def test_strip_images():
    "Row r is sample r, column k frame k; a generator, a list and a tensor give the same."
    xs = torch.rand(21, 6, 3, 4, 4, generator=gen())*2-1
    g = film_strip(xs, n=5, rows=3).images[0].get_array().data
    want = to_grid(torch.stack([xs[i,r] for r in range(3) for i in (0, 5, 10, 15, 20)]), ncol=5)
    assert np.array_equal(g[-len(want):], want)
    for o in (iter(xs), list(xs)):
        ax = film_strip(o, n=5, rows=3)
        assert np.array_equal(ax.images[0].get_array(), g) and [t.get_text() for t in ax.texts]==['0', '5', '10', '15', '20']

def test_strip_points():
    xs = [s*torch.randn(500, 2, generator=gen(1)) for s in (3., 2., 1.)]
    fig = film_strip(xs).figure
    lims = {ax.get_xlim() for ax in fig.axes}
    assert len(fig.axes)==3 and len(lims)==1 and 3*2<lims.pop()[1]<3*4 # one window, as wide as the noise
    for ax,x in zip(fig.axes, xs): assert np.allclose(ax.collections[0].get_offsets(), x)
    far = film_strip([100*xs[2], xs[2]]).figure
    assert far.axes[0].get_xlim()[1]<20, 'at most four times the data, or the data would be a dot'
    assert film_strip(xs, lim=1.5).get_xlim()==(-1.5, 1.5)

def test_strip_tokens():
    xs = torch.randint(5, (9, 4, 6), generator=gen())
    fig = film_strip(xs, n=3, rows=2, names='abcde').figure
    assert len(fig.axes)==2
    for r,ax in enumerate(fig.axes): assert [t.get_text() for t in ax.texts]==['abcde'[i] for i in xs[[0, 4, 8],r].flatten()]
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()]==['0', '4', '8']
    long = film_strip(torch.zeros(4, 4, 100, dtype=torch.long)).figure
    assert len(long.axes)==1, 'as many samples as fit'

def test_strip_unknown():
    seen = []
    def draw(x, ax, k): seen.append((x.item(), ax, k))
    fig = film_strip([torch.tensor(float(i)) for i in range(9)], n=3, draw=draw, k=7).figure
    assert [(x, k) for x,_,k in seen]==[(0, 7), (4, 7), (8, 7)] and [ax for _,ax,_ in seen]==fig.axes
    plt.close('all')
    for x in (torch.zeros(3), torch.zeros(3, 5), torch.zeros(2, 4, 8, 8)):
        with pytest.raises(TypeError, match='pass draw='): film_strip([x]*3)
    assert not plt.get_fignums()

@pytest.mark.parametrize('x,show', [(torch.zeros(3, 2), show_points), (torch.zeros(3, 2, dtype=torch.long), show_tokens),
                                    (torch.zeros(3, 4, 4), show_images), (torch.zeros(3, 3, 4, 4), show_images)])
def test_artists(x, show): assert artists(x)[0] is show

# --- losses ---
def test_buckets():
    t, loss = torch.rand(500, 2, generator=gen(), dtype=torch.float64)*.8, torch.rand(500, 2, generator=gen(1), dtype=torch.float64)
    t[0,0] = 1.
    o = buckets(t, loss, bins=5)
    assert o.count.sum()==1000 and o.count[-1]==1 and o.mean[-1]==loss[0,0] and np.allclose(o.edges, [0, .2, .4, .6, .8, 1])
    for i in range(4):
        part = loss[(t>=i/5) & (t<(i+1)/5)].numpy()
        assert o.count[i]==len(part) and np.isclose(o.mean[i], part.mean())
        assert np.isclose(np.mean(part<o.low[i]), .1, atol=.01) and np.isclose(np.mean(part>o.high[i]), .1, atol=.01)
    empty = buckets(torch.tensor([.95]), torch.tensor([2.]))
    assert empty.count.tolist()==[0]*9+[1] and np.isnan(empty.mean[:9]).all() and empty.mean[9]==2
    ax = loss_by_t(t, loss, bins=5)
    assert [int(o.get_text()) for o in ax.texts]==o.count.tolist() and np.array_equal(ax.lines[0].get_ydata(), o.mean)

@pytest.mark.parametrize('t,loss,word', [(torch.zeros(3), torch.zeros(3, 1), 'average'), (torch.tensor([1.5]), torch.zeros(1), r'\[0,1\]'),
                                         (torch.tensor([-.1]), torch.zeros(1), r'\[0,1\]'), (torch.zeros(0), torch.zeros(0), 'at least one')])
def test_refused_losses(t, loss, word):
    with pytest.raises(ValueError, match=word): loss_by_t(t, loss)
    assert not plt.get_fignums()

def test_smooth():
    x = torch.rand(40, generator=gen(), dtype=torch.float64).tolist()
    want = [np.average(x[:k+1], weights=[.9**(k-i) for i in range(k+1)]) for k in range(40)]
    assert np.allclose(smooth(x, .9), want)
    holes = smooth([math.nan, 1., math.inf, 3.], .5)
    assert np.isnan(holes[0]) and np.allclose(holes[1:], [1, 1, (.5*1+3)/1.5])
    with pytest.raises(ValueError, match='beta'): smooth(x, 1)

def test_loss_curve():
    x = [3., 2., math.nan, 1.]
    ax = loss_curve(x, label='a')
    raw, mean, mark = ax.lines
    assert np.array_equal(raw.get_ydata(), x, equal_nan=True) and np.allclose(mean.get_ydata(), smooth(x)) and list(mark.get_xdata())==[2, 2]
    assert [o.get_text() for o in ax.get_legend().get_texts()]==['a']
    assert loss_curve(torch.ones(3), ax=ax) is ax
    with pytest.raises(ValueError, match='no losses'): loss_curve([])

# --- the slider ---
def test_scrub():
    "Moving the slider draws that state, by the function that fits or by the caller's."
    seen = []
    box = scrub(iter([torch.tensor(float(i)) for i in range(5)]), draw=lambda x, k: seen.append((x.item(), k)), k=1)
    slider = box.children[0]
    slider.value = 3
    assert seen==[(0, 1), (3, 1)] and (slider.min, slider.max)==(0, 4)
    with pytest.raises(ValueError, match='no states'): scrub([])

def test_scrub_images(monkeypatch):
    shown = []
    monkeypatch.setattr(plt, 'show', lambda: shown.append(plt.gcf().axes[0].images[0].get_array().data.copy()))
    xs = torch.rand(4, 2, 5, 5, generator=gen())
    scrub(xs, lo=0).children[0].value = 2
    assert np.array_equal(shown[0], to_grid(xs[0], lo=0)) and np.array_equal(shown[-1], to_grid(xs[2], lo=0))

def test_light():
    "Widgets are imported by the slider alone."
    code = "import sys, diffnb.viz; print([o for o in ('ipywidgets', 'torchvision') if o in sys.modules])"
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.strip()=='[]'
