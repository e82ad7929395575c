"The built site in headless Chromium, page by page; and the build's own checks, shown to fail."
import json, re, sys
from urllib.parse import urlsplit
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT/'tools'))
from docs import faults, page
from reference import outline, signature, table

NBS = sorted((ROOT/'nbs').glob('[!.]*.ipynb'))
LOOK = '''() => ({
    broken: [...document.images].filter(o => !(o.complete && o.naturalWidth)).map(o => o.src.slice(0, 90)),
    maths: document.querySelectorAll('span.math').length,
    unset: [...document.querySelectorAll('span.math')].filter(o => !o.querySelector('.katex') || o.querySelector('.katex-error')).map(o => o.innerText),
    text: (() => { const d = document.body.cloneNode(true);
        d.querySelectorAll('pre, code, script, style, .katex').forEach(o => o.remove()); return d.textContent })(),
})'''

@pytest.fixture
def visit(browser, site):
    "A function that opens a page of the site and returns it, with what went wrong and what left this machine."
    ctx = browser.new_context(viewport=dict(width=1280, height=1000))
    away, wrong, host = [], [], urlsplit(site).netloc
    def request(route):
        if urlsplit(route.request.url).netloc==host: route.continue_()
        else: away.append(route.request.url); route.abort()
    ctx.route(re.compile('^(https?|wss?):'), request)
    def f(name):
        pg = ctx.new_page()
        pg.on('console', lambda m: m.type in ('error', 'warning') and wrong.append(m.text))
        pg.on('pageerror', lambda e: wrong.append(str(e)))
        pg.on('response', lambda r: r.status>=400 and wrong.append(f'{r.status} {r.url}'))
        pg.goto(f'{site}/{name}', wait_until='load')
        pg.wait_for_load_state('networkidle')
        return pg
    f.away, f.wrong = away, wrong
    yield f
    ctx.close()

@pytest.mark.site
@pytest.mark.parametrize('nb', NBS, ids=lambda o: o.stem)
def test_page(visit, nb):
    pg = visit(page(nb))
    look = pg.evaluate(LOOK)
    assert visit.away==[], 'a request left this machine'
    assert visit.wrong==[], 'the console shows errors'
    assert look['broken']==[], 'pictures that do not load'
    assert look['unset']==[], 'maths that KaTeX did not set'
    assert not re.search(r'\$\$|\\\(|\\\[|\\(frac|sqrt|alpha|sigma)\b', look['text']), 'raw TeX in the text'
    cells = [c for c in json.loads(nb.read_text())['cells'] if c['cell_type']=='markdown']
    tex = re.search(r'\$[^$\n]+\$', re.sub(r'`[^`]*`', '', '\n'.join(''.join(c['source']) for c in cells)))
    assert bool(look['maths'])==bool(tex)

@pytest.mark.site
def test_every_page(docs, site, browser):
    "No page is left unseen by `test_page`, and the sidebar leads to each."
    assert {f.name for f in docs.rglob('*.html')}=={page(o) for o in NBS}
    pg = browser.new_page()
    pg.goto(f'{site}/index.html')
    links = pg.eval_on_selector_all('#quarto-sidebar a[href]', 'a => a.map(o => o.href)')
    assert {page(o) for o in NBS} <= {o.split('/')[-1].split('#')[0] for o in links}
    pg.close()

@pytest.mark.site
def test_search(visit):
    pg = visit('index.html')
    pg.locator('#quarto-search input').press_sequentially('schedule', delay=20)
    hit = pg.locator('#quarto-search a, .aa-Panel a').first # smalldocs, Quarto
    hit.wait_for(timeout=15_000)
    hit.click()
    pg.wait_for_load_state('load')
    assert not pg.url.endswith('index.html') and 'chedule' in pg.inner_text('main')
    assert visit.away==[] and visit.wrong==[]

@pytest.mark.site
def test_reference(visit):
    "A function's signature comes with its source and a table of its parameters."
    pg = visit('core.html')
    name = pg.locator('h3#mean_loss, section#mean_loss').first
    name.wait_for()
    assert pg.locator('a:text-is("source")[href*="/diffnb/core.py#L"]').count()
    assert pg.locator('table:has-text("Details"):has-text("as a process returns it")').count()==1
    assert pg.locator('details:has-text("Exported source") pre:has-text("def mean_loss")').count()==1

@pytest.mark.parametrize('html, fault', [
    ('<a href="gone.html">x</a>', 'broken link gone.html'),
    ('<a href="b.html#none">x</a>', 'no anchor for b.html#none'),
    ('<a href="#none">x</a>', 'no anchor for #none'),
    ('<img src="none.png">', 'broken link none.png'),
    ('<script src="https://cdn.example.com/a.js"></script>', 'loads https://cdn.example.com/a.js from another host'),
    ('<link rel="stylesheet" href="//cdn.example.com/a.css">', 'loads //cdn.example.com/a.css from another host'),
    ('<a href="https://git.example/src/gone.py#L3">x</a>', 'no source file for https://git.example/src/gone.py#L3'),
])
def test_faults(tmp_path, html, fault):
    "The build refuses a page with this in it, and nothing else about it."
    (tmp_path/'b.html').write_text('<h1 id="here">b</h1>')
    (tmp_path/'a.html').write_text('<a href="b.html#here">ok</a><a href="https://example.com">ok</a>')
    check = lambda: faults(tmp_path, ['00_a.ipynb', '01_b.ipynb'], tmp_path, 'https://git.example/src/')
    assert check()==[]
    (tmp_path/'a.html').write_text(html)
    assert check()==[f'a.html: {fault}']

def test_missing_page(tmp_path):
    (tmp_path/'a.html').write_text('')
    assert faults(tmp_path, ['00_a.ipynb', '01_b.c.ipynb'])==['01_b.c.ipynb: no page b.c.html']

def test_outline():
    "Signature and table come from the source: alternatives apart, defaults as written, no bar that would end a cell."
    from diffnb.schedules import Schedule, cosine
    kind, params, returns = outline(cosine) # a preset: the function inside
    assert signature(kind, 'cosine', params, returns).startswith('def cosine(T:int|None=None, ')
    row = table(params, returns).splitlines()[2]
    assert row.startswith('| `T` | `int` or `None` | `None` | ') and row.count('|')==5
    kind, params, returns = outline(Schedule)
    assert kind=='class' and [p.name for p in params]==['name', 'fn', 'abar', 'space', 'inverse'] and all(p.comment for p in params)
    assert [p.default for p in params][:3]==['', '', 'None']
