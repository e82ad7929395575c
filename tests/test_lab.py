"The notebooks as a person runs them: JupyterLab, Run All, move a slider, see the picture change."
import json
import pytest
from conftest import ROOT

pytestmark = pytest.mark.lab
NBS = [o for o in ('01_viz', '80_tour', '83_diffit') if (ROOT/'nbs'/f'{o}.ipynb').exists()]
IMG = '.jp-Cell:has(.widget-slider) .widget-output img'

def source(name): return ''.join(s for c in json.loads((ROOT/'nbs'/f'{name}.ipynb').read_text())['cells'] for s in c['source'])

@pytest.mark.parametrize('name', NBS)
def test_run_all(open_nb, name):
    nb = open_nb(f'nbs/{name}.ipynb')
    nb.run_all()
    outs = nb.outputs()
    assert not [o for o in outs if o['output_type']=='error']
    assert [o for o in outs if 'image/png' in o.get('data', {})], 'no pictures'
    if name!='80_tour': slide(nb)
    assert not nb.errors

def slide(nb):
    "Drag the first slider with the mouse: its value and its picture change."
    page = nb.page
    handle = page.locator('.widget-slider .noUi-handle').first
    img, value = page.locator(IMG).first, page.locator('.widget-slider .widget-readout').first
    img.wait_for(timeout=60_000)
    for _ in range(40): # pictures that appear above push it away for a while
        handle.scroll_into_view_if_needed()
        was = handle.bounding_box()
        page.wait_for_timeout(500)
        if was==handle.bounding_box() and 0<was['y']<page.viewport_size['height']-50: break
    before = img.get_attribute('src'), value.inner_text()
    box = handle.bounding_box()
    x, y = box['x']+box['width']/2, box['y']+box['height']/2
    bar = page.locator('.widget-slider .noUi-target').first.bounding_box()
    to = bar['x']+bar['width']*(.8 if x < bar['x']+bar['width']/2 else .2) # towards the farther end
    page.mouse.move(x, y); page.mouse.down()
    page.mouse.move(to, y, steps=8); page.mouse.up()
    page.wait_for_function(f"src => {{ const o = document.querySelector('{IMG}'); return o && o.src!==src }}", arg=before[0], timeout=60_000)
    assert value.inner_text()!=before[1]
