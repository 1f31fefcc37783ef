"The site is built once and looked at: by an HTML parser everywhere, and in a headless Chromium where there is one."
import functools
import http.server
import json
import re
import shutil
import threading
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[1]
BROWSER = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
WIDE, NARROW = dict(width=1280, height=900), dict(width=360, height=740)


@pytest.fixture(scope='module')
def site():
    from direction_fusion.website import build_site
    return build_site(ROOT)


class Page(HTMLParser):
    "What a page links to, what may be linked to in it, and what it shows."
    VOID = {'area', 'base', 'br', 'col', 'embed', 'hr', 'img', 'input', 'link', 'meta', 'source', 'track', 'wbr'}

    def __init__(self, text):
        super().__init__()
        self.links, self.ids, self.images, self.tags, self.text = [], set(), [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        self.tags.append((tag, a))
        self.ids |= {a[k] for k in ('id', 'name') if a.get(k)}
        self.links += [a[k] for k in ('href', 'src') if a.get(k) and tag != 'base']
        if tag == 'img': self.images.append(a)

    def handle_data(self, data): self.text.append(data)


@pytest.fixture(scope='module')
def pages(site):
    return {p.relative_to(site).as_posix(): Page(p.read_text(encoding='utf-8')) for p in sorted(site.rglob('*.html'))}


# Without a browser

def test_every_notebook_has_a_page(site, pages):
    from direction_fusion.website import page_name
    nbs = ROOT/'nbs'
    names = [p.relative_to(nbs).as_posix() for p in nbs.rglob('*.ipynb')]
    names = [n for n in names if not any(d[0] in '._' for d in n.split('/'))]
    assert not (missing := {page_name(n).replace('.ipynb', '.html') for n in names} - set(pages)), missing
    side = {a['href'] for tag, a in pages['index.html'].tags if 'sidebar-link' in a.get('class', '') and a.get('href')}
    assert not (lost := {page_name(n).replace('.ipynb', '.html') for n in names} - side), f'in no section of the sidebar: {lost}'


def test_no_dead_link_or_anchor(site, pages):
    dead = []
    for name, page in pages.items():
        for link in page.links:
            url = urlsplit(link)
            if url.scheme or url.netloc: continue
            target = (site/name).parent/unquote(url.path) if url.path else site/name
            if target.is_dir(): target /= 'index.html'
            if not target.is_file(): dead.append(f'{name}: {link}')
            elif url.fragment and target.suffix == '.html':
                other = pages[target.resolve().relative_to(site.resolve()).as_posix()]
                if unquote(url.fragment) not in other.ids: dead.append(f'{name}: {link} (no such anchor)')
    assert not dead, '\n'.join(sorted(set(dead)))


def test_no_request_to_another_host(site):
    from direction_fusion.site import remote_requests
    asked = {f'{p.name}: {r}' for p in site.rglob('*') if p.suffix in ('.html', '.css')
             for r in remote_requests(p.read_text(encoding='utf-8'), p.suffix == '.css')}
    assert not asked, asked


def test_pages_can_be_read_aloud(pages):
    for name, page in pages.items():
        tags = [t for t, _ in page.tags]
        assert dict(page.tags)['html'].get('lang') and tags.count('main') == 1 and tags.count('title') >= 1, name
        assert tags.count('h1') == 1, f"{name} has {tags.count('h1')} first headings"
        assert any('skip-link' in a.get('class', '') for _, a in page.tags), name
        silent = [i for i in page.images if not i.get('alt') and 'navbar-logo' not in i.get('class', '')]
        assert not silent, f"{name}: no words for {[i['src'][:60] for i in silent]}"


def test_formulas_are_set(site, pages):
    tex = [p for p in (ROOT/'nbs').glob('0[2-6]*.ipynb') if '$$' in p.read_text(encoding='utf-8')]
    assert tex
    for p in tex: assert sum(t == 'math' for t, _ in pages[re.sub(r'^\d+_', '', p.stem) + '.html'].tags) > 5, p.name
    left = [n for n in pages if re.search(r'class="math (inline|display)"', (site/n).read_text(encoding='utf-8'))]
    assert not left, f'formulas left as TeX: {left}'


def test_search_index_holds_every_page(site, pages):
    index = json.loads((site/'search.json').read_text(encoding='utf-8'))
    assert {e['href'].partition('#')[0] for e in index} >= set(pages) - {'CONTRIBUTING.html'}
    assert any('orthogonal' in e['text'].lower() and e['href'].startswith('orthogonal.html') for e in index)


@pytest.fixture(scope='module')
def found():
    from direction_fusion.pages import published
    return published(ROOT)


def shown(name): # what the cells of a committed notebook have written
    cells = json.loads((ROOT/'nbs'/name).read_text(encoding='utf-8'))['cells']
    return [''.join(o.get('data', {}).get('text/markdown', '')) for c in cells for o in c.get('outputs', [])]


def test_choice_is_up_to_date(found):
    from direction_fusion.pages import advice, choices_table, rule_seconds
    table = choices_table(found, rule_seconds(ROOT/'assets/benchmarks/methods.json'))
    assert advice(table) in shown('choose.ipynb'), 'run `make refresh`: the advice is older than the records'


def test_results_are_up_to_date(found):
    from direction_fusion.pages import streams, streams_table
    from direction_fusion.plots import common_runs
    from direction_fusion.ranking import chosen, plain, results_table
    from direction_fusion.runner import stand_ins
    runs = plain(chosen(found['text']))
    table = results_table(runs, common_runs(stand_ins(runs)))
    for name, said in [('index.ipynb', table), ('index.ipynb', streams_table(streams(found))), ('analysis/compare.ipynb', table)]:
        assert said in shown(name), f'run `make refresh`: {name} is older than the records'


def test_no_page_shows_what_only_a_machine_reads(site, pages):
    "Markdown that was not understood, numbers that are none, alternative texts below figures."
    for name in pages:
        text = (site/name).read_text(encoding='utf-8')
        prose = re.sub(r'<(pre|code|script|style|math)\b.*?</\1>|<[^>]*>', ' ', text.partition('<main')[2].partition('</main>')[0], flags=re.S)
        assert not (odd := re.findall(r'\[[^][]*\]\([\w./#-]+\)|\bnan\b|\{fig-alt=', prose)), f'{name}: {odd[:3]}'
        long = [c for c in re.findall(r'<figcaption[^>]*>(.*?)</figcaption>', text, re.S) if len(re.sub('<[^>]*>', '', c)) > 160]
        assert not long, f'{name}: a caption is short, the rest is for `fig-alt`: {long[0][:200]}'


def test_parameters_stand_in_tables(site):
    page = (site/'orthogonal.html').read_text(encoding='utf-8')
    tables = re.findall(r'<table[^>]*>.*?</table>', page, re.S)
    assert any('<code>torch.Tensor</code>' in t and '<strong>returns</strong>' in t for t in tables)
    assert 'def project_out(' not in re.sub(r'<details.*?</details>', '', re.sub(r'</?span[^>]*>', '', page), flags=re.S)


def test_every_published_study_is_shown(found, pages):
    for study in found:
        for page in ('compare', 'method', 'interference'):
            assert len(pages[f'results/{study}/{page}.html'].images) > 1, f'{study}: no figures in {page}'


# In a browser

@pytest.fixture(scope='module')
def served(site):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *a): pass
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=site)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}/'
        server.shutdown()


@pytest.fixture(scope='module')
def browser():
    if not BROWSER: pytest.skip('no Chromium on the PATH; on Debian: apt-get install chromium')
    sync_api = pytest.importorskip('playwright.sync_api', reason="needs playwright: pip install 'direction_fusion[dev]'")
    with sync_api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=BROWSER, args=['--no-sandbox', '--disable-gpu'])
        yield b
        b.close()


@pytest.fixture
def tab(browser, served):
    "Opens a page of the site; whatever goes wrong in it is in `said`."
    contexts, said = [], []
    def new(name='index.html', size=WIDE, scheme='light'):
        c = browser.new_context(viewport=size, color_scheme=scheme)
        contexts.append(c)
        t = c.new_page()
        t.on('console', lambda m: said.append(f'{t.url}: {m.text}') if m.type in ('error', 'warning') else None)
        t.on('pageerror', lambda e: said.append(f'{t.url}: {e}'))
        given_up = lambda r: r.url.endswith('favicon.svg') and 'ERR_ABORTED' in (r.failure or '') # the tab has gone on
        t.on('requestfailed', lambda r: None if given_up(r) else said.append(f'{t.url}: {r.url} failed'))
        t.on('response', lambda r: said.append(f'{t.url}: {r.url} {r.status}') if r.status >= 400 else None)
        own = served, 'data:', 'blob:'
        t.on('request', lambda r: None if r.url.startswith(own) else said.append(f'{t.url}: asks {r.url}'))
        t.goto(served + name, wait_until='load')
        return t
    new.said = said
    yield new
    for c in contexts: c.close()


LOOK = '''() => ({
  images: [...document.querySelectorAll('main img')].filter(i => !(i.complete && i.naturalWidth && i.offsetWidth))
    .map(i => i.src.slice(0, 80)),
  formulas: [...document.querySelectorAll('main math')].filter(m => m.getBoundingClientRect().height < 4).length,
  wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  culprits: [...document.querySelectorAll('main *, nav *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)
    .slice(0, 3).map(e => e.tagName + '.' + e.className)})'''


def test_every_page_on_wide_and_narrow_screens(tab, served, pages):
    t, wrong = tab(), []
    for name in pages:
        t.set_viewport_size(WIDE)
        t.goto(served + name, wait_until='load')
        for size in (WIDE, NARROW):
            t.set_viewport_size(size)
            look = t.evaluate(LOOK)
            if look['wide'] > 0: wrong.append(f"{name} scrolls sideways by {look['wide']} at {size['width']}: {look['culprits']}")
        if look['images']: wrong.append(f"{name} does not show {look['images']}")
        if look['formulas']: wrong.append(f"{name} hides {look['formulas']} formulas")
    assert not wrong + tab.said, '\n'.join(wrong + tab.said)


def test_home_says_it_on_one_screen(tab):
    t = tab()
    bottom = t.evaluate('document.querySelector("main figure, main .cell-output-display").getBoundingClientRect().bottom')
    assert bottom < WIDE['height'], f'the figure ends at {bottom}'
    code = t.evaluate('[...document.querySelectorAll("main pre")].filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.innerText)')
    assert not code, f'cut off on a wide screen: {code}'


def test_search_finds(tab):
    t = tab()
    t.keyboard.press('/')
    t.keyboard.type('orthogonal')
    t.wait_for_selector('.search-result', timeout=5000)
    found = t.eval_on_selector_all('.search-result', 'es => es.map(e => e.getAttribute("href"))')
    assert any('orthogonal.html' in h for h in found), found
    t.keyboard.press('Enter')
    t.wait_for_url('**/*.html*')
    assert not tab.said, tab.said


def brightness(t): # of the page's background, 0 to 255
    return sum(map(float, re.findall(r'[\d.]+', t.evaluate('getComputedStyle(document.body).backgroundColor'))[:3])) / 3


def test_dark_and_light(tab):
    t = tab(scheme='dark')
    t.wait_for_function("document.documentElement.classList.contains('quarto-dark')")
    assert brightness(t) < 60 # as the system prefers
    t.click('.quarto-color-scheme-toggle')
    t.wait_for_function("!document.documentElement.classList.contains('quarto-dark')")
    assert brightness(t) > 200
    t.reload(wait_until='load')
    assert brightness(t) > 200, 'the choice was forgotten'


def test_keyboard_reaches_the_text(tab):
    t = tab('orthogonal.html')
    t.keyboard.press('Tab')
    assert t.evaluate('document.activeElement.className') == 'skip-link'
    t.keyboard.press('Enter')
    assert t.evaluate('document.activeElement.tagName') == 'MAIN'


def test_sliders_and_filters_work(tab):
    t = tab('explore.html')
    before = t.inner_text('#df-said')
    t.select_option('#df-method', 'task_arithmetic')
    t.focus('#df-knobs input')
    for _ in range(8): t.keyboard.press('ArrowLeft')
    assert t.inner_text('#df-said') != before and t.inner_text('#df-knobs output') == '0'
    said = dict(re.findall(r'(tasks|experts|base)\D*([\d.]+) %', t.inner_text('#df-said')))
    assert said['tasks'] == said['base'], 'at λ = 0 the fused model is the base'
    assert len(t.query_selector_all('.df-row')) == 5
    t = tab('choose.html')
    rows = lambda: t.eval_on_selector_all('#df-choose tbody tr', 'rs => rs.filter(r => !r.hidden).length')
    every = rows()
    t.check('#df-filter input[value=removable]')
    assert 0 < rows() < every and t.inner_text('#df-count') == f'{rows()} of {every} rows'
    assert not tab.said, tab.said


@pytest.mark.parametrize('scheme,size,names', [('light', WIDE, ['index', 'choose', 'explore', 'orthogonal', 'inside']),
                                               ('dark', WIDE, ['choose', 'orthogonal']), ('light', NARROW, ['explore'])],
                         ids=['light', 'dark', 'narrow'])
def test_axe_finds_nothing_serious(tab, served, site, scheme, size, names):
    axe = pytest.importorskip('axe_playwright_python.sync_playwright',
                              reason="needs axe-playwright-python: pip install 'direction_fusion[dev]'").Axe()
    found, t = [], tab(size=size, scheme=scheme)
    executed = [p.relative_to(site).as_posix().removesuffix('.html') for p in sorted(site.glob('results/*/*.html'))[:1]]
    for name in names + (executed if scheme == 'light' and size == WIDE else []):
        t.goto(f'{served}{name}.html', wait_until='load')
        time.sleep(.1) # the theme's class is set a moment later
        said = axe.run(t, options={'runOnly': ['wcag2a', 'wcag2aa', 'wcag21aa'], 'resultTypes': ['violations']}).response
        assert len(said['passes']) > 10, f'axe looked at nothing of {name}'
        found += [f"{name}: {v['id']} in {len(v['nodes'])} places: " + '; '.join(n['html'][:120] for n in v['nodes'][:2])
                  for v in said['violations'] if v['impact'] in ('serious', 'critical')]
    assert not found, '\n'.join(found)
