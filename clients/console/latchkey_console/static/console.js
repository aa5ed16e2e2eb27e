// What the page does in place when there is a script: dialogs, filtering, more rows, copying, and
// times in the viewer's zone. All of it works without, by links, forms and redirects; this asks the
// same addresses for the part of the page that changes.
"use strict";
(() => {
  const PART = { "X-Latchkey-Part": "1" };
  // Longer than the server waits for Latchkey, so that its own words come first.
  const WAIT_MS = 30_000;
  const TYPING_MS = 200;
  const COPIED_MS = 2_500;
  const byId = (id) => document.getElementById(id);
  const one = (selector, from = document) => from.querySelector(selector);
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];

  // ---- asking the server ----

  // What is asked for the list makes moot what was asked for it before: answers may overtake.
  let asking = new AbortController();
  function anew() {
    asking.abort();
    asking = new AbortController();
    byId("main").removeAttribute("aria-busy");
    return asking.signal;
  }

  // Returns what came as a document.
  async function ask(url, options = {}) {
    const signals = [AbortSignal.timeout(WAIT_MS), ...(options.signal ? [options.signal] : [])];
    const answer = await fetch(url, {
      ...options,
      headers: PART,
      cache: "no-store",
      signal: AbortSignal.any(signals),
    });
    return parsed(await answer.text());
  }

  // Puts what came where it belongs, and returns what that was.
  function place(page, { focus } = {}) {
    const told = one("#message", page);
    if (told) return tell(told);
    const dialog = one("dialog", page);
    if (dialog) return open(dialog);
    const main = one("main", page);
    // Neither: this is not the page that answered, so let the browser see for itself.
    if (!main) return location.assign("/");
    dismiss();
    return replaceMain(main, focus);
  }

  async function load(url, { push = false, focus } = {}) {
    const signal = anew();
    byId("main").setAttribute("aria-busy", "true");
    const to = new URL(url, location.href);
    // As many rows as there are now, for when the dialog comes back to the list.
    const shown = location.pathname === "/" && new URLSearchParams(location.search).get("show");
    if (to.pathname !== "/" && shown) to.searchParams.set("show", shown);
    try {
      const page = await ask(to, { signal });
      if (signal.aborted) return;
      if (push && to.pathname === "/") history.pushState(null, "", to);
      place(page, { focus });
    } catch {
      if (!signal.aborted) lost("Nothing was changed. Try again.");
    } finally {
      if (!signal.aborted) byId("main").removeAttribute("aria-busy");
    }
  }

  function lost(what) {
    const section = document.createElement("section");
    section.id = "message";
    section.className = "note bad";
    section.setAttribute("role", "alert");
    section.tabIndex = -1;
    const title = document.createElement("h2");
    title.textContent = "This page's server did not answer";
    const text = document.createElement("p");
    text.textContent = what;
    section.append(title, text);
    tell(section);
  }

  // In the open dialog, so that what was typed stays; else on top of the list.
  function tell(section) {
    const where = one("dialog .body") || byId("main");
    all("#message").forEach((old) => old.remove());
    where.prepend(section);
    section.focus();
    section.scrollIntoView({ block: "nearest" });
  }

  // ---- the list ----

  function replaceMain(main, focus) {
    const before = byId("main");
    // The very field that is typed in stays, with caret and undo.
    const typing = document.activeElement?.id === "q" ? document.activeElement : null;
    const field = one("#q", main);
    const held = focusIn(before);
    if (typing && field) field.replaceWith(typing);
    times(main);
    before.replaceWith(main);
    if (dialogOpen() === null) main.removeAttribute("inert");
    const told = byId("notice");
    if (typing && field) typing.focus();
    else if (told) focusNear();
    else if (focus) (one(focus, main) || main).focus();
    else if (held) (one(held, main) || main).focus({ preventScroll: true });
    say((told ?? byId("count"))?.textContent ?? "");
  }

  // What finds that which has the focus in a list in the one that takes its place; null: it is
  // elsewhere, as in a dialog.
  function focusIn(main) {
    const element = document.activeElement;
    if (!main.contains(element)) return null;
    if (element.id) return `#${CSS.escape(element.id)}`;
    if (element.dataset.review) return `[data-review="${CSS.escape(element.dataset.review)}"]`;
    const row = element.closest("tr[id]");
    return row ? `#${CSS.escape(row.id)} button` : "main";
  }

  // Where a row has gone, the focus goes to the one that took its place: the receipt is in sight
  // wherever the list is scrolled to, and is said.
  function focusNear() {
    const rows = opener ? [opener.id, opener.next, opener.previous] : [];
    const row = rows.map((id) => id && byId(id)).find(Boolean);
    const target = row && (one("button", row) || row);
    (target || byId("generate") || byId("main")).focus({ preventScroll: true });
  }

  async function more(link) {
    const rows = byId("rows");
    const count = byId("count");
    if (link.getAttribute("aria-busy")) return;
    link.setAttribute("aria-busy", "true");
    const url = new URL(link.dataset.rows, location.href);
    url.searchParams.set("after", rows.lastElementChild.id);
    try {
      const answer = await fetch(url, { headers: PART, signal: AbortSignal.timeout(WAIT_MS) });
      const text = await answer.text();
      if (!answer.ok) {
        const told = one("#message", parsed(text));
        return told ? tell(told) : lost("Try again.");
      }
      all("#message").forEach((old) => old.remove());
      const came = all("tr", parsed(`<table><tbody>${text}</tbody></table>`));
      const added = came.filter((row) => !byId(row.id));
      added.forEach(times);
      rows.append(...added);
      const shown = rows.childElementCount;
      const matching = Number(count.dataset.matching);
      const place = new URL(location.href);
      place.searchParams.set("show", String(shown));
      history.replaceState(null, "", place);
      count.textContent = count.textContent.replace(/^[\d,]+/, shown.toLocaleString("en"));
      if (shown >= matching || !added.length) link.remove();
      const next = added[0]?.firstElementChild;
      if (next) {
        next.tabIndex = -1;
        next.focus({ preventScroll: true });
      }
      say(count.textContent);
    } catch {
      lost("Try again.");
    } finally {
      link.removeAttribute("aria-busy");
    }
  }

  const parsed = (text) => new DOMParser().parseFromString(text, "text/html");

  let typed;
  function filter(form, delay) {
    clearTimeout(typed);
    typed = setTimeout(() => {
      const query = new URLSearchParams(new FormData(form));
      [...query].forEach(([name, value]) => value.trim() || query.delete(name));
      const url = query.size ? `/?${query}` : "/";
      history.replaceState(null, "", url);
      load(url, { focus: `#${document.activeElement?.id || "q"}` });
    }, delay);
  }

  // ---- dialogs ----

  let opener = null;
  let draft = null;
  const dialogOpen = () => one("dialog");

  // How to find again what opened the dialog, when the list has been put in anew meanwhile.
  function remember(element) {
    const row = element.closest("tr");
    opener = {
      id: row ? row.id : element.id,
      next: row?.nextElementSibling?.id,
      previous: row?.previousElementSibling?.id,
    };
  }

  function open(dialog) {
    // On the page from the start, it is itself what is there.
    const before = dialogOpen() === dialog ? null : dialogOpen();
    if (before) {
      dialog.classList.add("still");
      forget(before);
    }
    dialog.removeAttribute("open");
    const live = document.createElement("p");
    live.className = "vh live";
    live.setAttribute("role", "status");
    dialog.append(live);
    times(dialog);
    byId("dialog").replaceChildren(dialog);
    all("[inert]").forEach((element) => element.removeAttribute("inert"));
    const form = one("form[action='/tokens']:has(#name)", dialog);
    if (form) prepare(form, Boolean(before));
    dialog.showModal();
    (one("[aria-invalid]", dialog) || one(".note.bad", dialog) || one("[autofocus]", dialog))?.focus();
    dialog.addEventListener("cancel", (event) => {
      event.preventDefault();
      if (!("deliberate" in dialog.dataset)) close(dialog);
    });
    // Escape, before the browser takes it for leave to close on the second time.
    dialog.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && "deliberate" in dialog.dataset) event.preventDefault();
    });
    dialog.addEventListener("mousedown", (event) => {
      if (event.target === dialog && !("deliberate" in dialog.dataset)) close(dialog);
    });
    if (byId("secret")) draft = null;
    // What the dialog tells has changed the list behind it.
    if ("refresh" in dialog.dataset) refresh();
  }

  function prepare(form, again) {
    const tomorrow = new Date(Date.now() + 86_400_000);
    const two = (number) => String(number).padStart(2, "0");
    form.elements.date.min =
      `${tomorrow.getFullYear()}-${two(tomorrow.getMonth() + 1)}-${two(tomorrow.getDate())}`;
    if (!draft || again) return;
    for (const [name, value] of Object.entries(draft)) form.elements[name].value = value;
  }

  async function refresh() {
    const signal = anew();
    try {
      const main = one("main", await ask(listUrl(), { signal }));
      if (main && !signal.aborted) replaceMain(main);
    } catch {
      // The dialog is what counts; the list comes with the next look.
    }
  }

  // Where the list is, also when the page was opened at a dialog's address.
  const listUrl = () => (location.pathname === "/" ? location.href : closeUrl());
  const closeUrl = () => one("dialog [data-close]")?.getAttribute("href") ?? "/";

  // What is typed is there again when the form is opened anew, unless it was cancelled.
  function close(dialog, { keep = true } = {}) {
    const form = one("form[action='/tokens']:has(#name)", dialog);
    const { name, scope, expiry, date } = form?.elements ?? {};
    if (form) {
      draft = keep
        ? { name: name.value, scope: scope.value, expiry: expiry.value, date: date.value }
        : null;
    }
    if (location.pathname !== "/") {
      const url = closeUrl();
      history.replaceState(null, "", url);
      if (!byId("rows")) load(url);
    }
    dismiss();
    focusNear();
  }

  function dismiss() {
    const dialog = dialogOpen();
    if (dialog) forget(dialog);
  }

  // The secret leaves the document with its dialog.
  function forget(dialog) {
    all("#secret", dialog).forEach((code) => (code.textContent = ""));
    dialog.close();
    dialog.remove();
  }

  async function send(form, submitter) {
    if (form.getAttribute("aria-busy")) return;
    form.setAttribute("aria-busy", "true");
    // What this does makes the list that is under way an old one.
    anew();
    const { date, date_start: start } = form.elements;
    if (start && date?.value) {
      const [year, month, day] = date.value.split("-").map(Number);
      start.value = new Date(year, month - 1, day).toISOString();
    }
    try {
      const body = new URLSearchParams(new FormData(form, submitter));
      const page = await ask(form.action, { method: "POST", body });
      const notice = one("#notice", page);
      place(page);
      if (notice && location.pathname !== "/") history.replaceState(null, "", "/");
    } catch {
      lost("It is not known whether it was done. Sending it again is safe: it is done once.");
    } finally {
      form.removeAttribute("aria-busy");
    }
  }

  // ---- small things ----

  function say(text) {
    (one("dialog .live") || byId("live")).textContent = text;
  }

  const day = new Intl.DateTimeFormat(undefined, { dateStyle: "medium" });
  const exact = new Intl.DateTimeFormat(undefined, {
    year: "numeric",
    month: "long",
    day: "numeric",
    hour: "2-digit",
    minute: "2-digit",
    second: "2-digit",
    timeZoneName: "short",
  });

  function times(from) {
    for (const time of all("time", from)) {
      const at = new Date(time.dateTime);
      if (Number.isNaN(at.getTime())) continue;
      time.title = exact.format(at);
      time.textContent = "full" in time.dataset ? time.title : day.format(at);
    }
  }

  async function copy(button) {
    const code = byId(button.dataset.copy);
    const range = document.createRange();
    range.selectNodeContents(code);
    getSelection().removeAllRanges();
    getSelection().addRange(range);
    try {
      await navigator.clipboard.writeText(code.textContent);
    } catch {
      // No permission, or not over TLS: the old way, which needs the selection.
      if (!document.execCommand("copy")) {
        say("Not copied. The token is selected: press Ctrl+C or Command+C.");
        button.textContent = "Press Ctrl+C";
        return;
      }
    }
    code.dataset.copied = "";
    getSelection().removeAllRanges();
    button.textContent = "Copied";
    say("Copied");
    setTimeout(() => (button.textContent = "Copy again"), COPIED_MS);
  }

  // ---- events ----

  document.addEventListener("click", (event) => {
    const target = event.target.closest("a, button");
    if (!target || event.button || event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) {
      return;
    }
    if (target.dataset.copy) return void copy(target);
    if ("dismiss" in target.dataset) {
      event.preventDefault();
      byId("notice").remove();
      return focusNear();
    }
    if (target.id === "more") {
      event.preventDefault();
      return void more(target);
    }
    if ("close" in target.dataset && dialogOpen()) {
      event.preventDefault();
      const cancelled = !target.classList.contains("close");
      return close(dialogOpen(), { keep: !cancelled });
    }
    if (target.matches("a[data-part]")) {
      event.preventDefault();
      remember(target);
      const review = target.dataset.review;
      load(target.href, {
        push: true,
        focus: review ? `[data-review="${review}"]` : `#${target.id || "main"}`,
      });
    }
  });

  document.addEventListener("submit", (event) => {
    const { target: form, submitter } = event;
    if (form.id === "filter") {
      event.preventDefault();
      return filter(form, 0);
    }
    if (form.matches("form[data-part]")) {
      event.preventDefault();
      return void send(form, submitter);
    }
    if (form.method === "get" && submitter?.name === "id") {
      event.preventDefault();
      remember(submitter);
      const query = new URLSearchParams(new FormData(form, submitter));
      load(`/delete?${query}`);
    }
  });

  for (const kind of ["input", "compositionend"]) {
    document.addEventListener(kind, (event) => {
      const form = event.target.closest?.("#filter");
      if (form && !event.isComposing) filter(form, event.target.matches("select") ? 0 : TYPING_MS);
    });
  }

  addEventListener("popstate", () => {
    if (location.pathname === "/") load(location.href, { focus: "main" });
    else location.reload();
  });

  // Leaving takes the secret out of what a browser may keep of the page for the way back.
  addEventListener("pagehide", () => all("#secret").forEach((code) => (code.textContent = "")));
  addEventListener("pageshow", (event) => event.persisted && location.reload());
  addEventListener("beforeunload", (event) => {
    const code = byId("secret");
    if (code && !("copied" in code.dataset)) event.preventDefault();
  });

  document.documentElement.classList.add("js");
  times(document);
  const there = dialogOpen();
  if (there) open(there);
})();
