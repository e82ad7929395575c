"Shapes checked in every call, and a browser for the tests that use notebooks and site as a person does."
import functools, http.server, json, os, shutil, socket, subprocess, sys, threading, time, urllib.request
from pathlib import Path
import pytest
import typecheck

os.environ.setdefault('OMP_NUM_THREADS', '1') # tests are small; more threads only wait for each other

typecheck.install()

ROOT = Path(__file__).resolve().parents[1]
CHROME = os.environ.get('CHROME') or next(filter(None, map(shutil.which, ('chromium', 'google-chrome', 'chromium-browser'))), None)
ARGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-dev-shm-usage',
        '--disable-background-networking', '--disable-component-update', '--disable-sync']

def absent(what):
    "Skip where something is missing, except in CI, where all is to be there."
    (pytest.fail if os.environ.get('CI') else pytest.skip)(f'{what} is not installed')

@pytest.fixture(scope='session')
def browser():
    "Headless Chromium."
    if not CHROME: absent('Chromium')
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROME, headless=True, args=ARGS)
        yield b
        b.close()

# --- the site ---
class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args): pass

@pytest.fixture(scope='session')
def docs(tmp_path_factory):
    "The built site: the folder named by DIFFNB_SITE, else a build of its own."
    if o := os.environ.get('DIFFNB_SITE'): return (ROOT/o).resolve()
    out = tmp_path_factory.mktemp('site')/'docs'
    env = {k:v for k,v in os.environ.items() if k!='IN_TEST'}
    res = subprocess.run([sys.executable, 'tools/docs.py', '--check', '--out', out], cwd=ROOT, env=env, capture_output=True, text=True)
    assert res.returncode==0, res.stdout+res.stderr
    return out

@pytest.fixture(scope='session')
def site(docs):
    "The address at which the site is served, on this machine."
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=docs)) as srv:
        threading.Thread(target=srv.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{srv.server_port}'
        srv.shutdown()

# --- JupyterLab ---
def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

@pytest.fixture(scope='session')
def lab(tmp_path_factory):
    "A JupyterLab server over a copy of the notebooks, with settings of its own; its address."
    tmp, port = tmp_path_factory.mktemp('lab'), free_port()
    shutil.copytree(ROOT/'nbs', tmp/'work'/'nbs', ignore=shutil.ignore_patterns('.*', '_quarto.yml'))
    shutil.copy(ROOT/'settings.ini', tmp/'work')
    news = tmp/'settings'/'@jupyterlab'/'apputils-extension'/'notification.jupyterlab-settings'
    news.parent.mkdir(parents=True)
    news.write_text(json.dumps(dict(fetchNews='false', checkForUpdates=False))) # its pop-up covers a corner
    dirs = dict(JUPYTER_CONFIG_DIR='config', JUPYTER_DATA_DIR='data', JUPYTER_RUNTIME_DIR='run',
                JUPYTERLAB_SETTINGS_DIR='settings', JUPYTERLAB_WORKSPACES_DIR='workspaces')
    env = {**os.environ, **{k: str(tmp/v) for k,v in dirs.items()}, 'IN_TEST': '1'} # IN_TEST: nbdev_export does nothing
    cmd = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ip=127.0.0.1', f'--port={port}',
           '--ServerApp.port_retries=0', f'--ServerApp.root_dir={tmp/"work"}', '--IdentityProvider.token=',
           '--ServerApp.password=', '--ServerApp.disable_check_xsrf=True', '--LabApp.expose_app_in_browser=True']
    log, url = tmp/'lab.log', f'http://127.0.0.1:{port}'
    with open(log, 'wb') as out: p = subprocess.Popen(cmd, env=env, stdout=out, stderr=subprocess.STDOUT, cwd=tmp/'work')
    try:
        for _ in range(240):
            assert p.poll() is None, log.read_text()
            try: urllib.request.urlopen(url+'/api/status', timeout=2); break
            except OSError: time.sleep(0.25)
        else: pytest.fail('JupyterLab did not start\n'+log.read_text())
        yield url
    finally:
        p.terminate()
        try: p.wait(15)
        except subprocess.TimeoutExpired: p.kill()

class LabNotebook:
    "One notebook open in a JupyterLab page of its own."
    def __init__(self, browser, lab, path):
        self.ctx = browser.new_context(viewport=dict(width=1280, height=1000))
        self.page, self.errors = self.ctx.new_page(), []
        self.page.on('pageerror', lambda e: self.errors.append(str(e)))
        self.page.goto(f'{lab}/lab/tree/{path}?reset', wait_until='domcontentloaded')
        self.page.wait_for_function('() => window.jupyterapp', timeout=90_000)
        self.js('await app.restored')
        self.page.wait_for_selector('.jp-Notebook .jp-Cell', timeout=60_000)
        self.js('''for (let i=0; i<900; i++) {
            const s = app.shell.currentWidget?.context?.sessionContext;
            if (s?.isReady && s.session?.kernel?.status==='idle') return;
            await new Promise(r => setTimeout(r, 100));
        }
        throw new Error('the kernel is not ready')''')
    def js(self, code): return self.page.evaluate(f'async () => {{ const app = window.jupyterapp; {code} }}')
    def run_all(self): self.js("await app.commands.execute('notebook:run-all-cells')")
    def outputs(self):
        "The outputs of all code cells, from the notebook's model: cells off screen are not in the page."
        return self.js('''return Array.from(app.shell.currentWidget.content.model.cells)
            .filter(c => c.type==='code').flatMap(c => c.toJSON().outputs)''')
    def close(self):
        self.js('await app.shell.currentWidget.context.sessionContext.shutdown()')
        self.ctx.close()

@pytest.fixture
def open_nb(browser, lab):
    "A function that opens a notebook in JupyterLab; its kernel is shut down when the test ends."
    made = []
    yield lambda path: made.append(LabNotebook(browser, lab, path)) or made[-1]
    for o in made: o.close()
