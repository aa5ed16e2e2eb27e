// Enhances the page in place: dialogs, filtering, more rows, copying, and times in the viewer's zone.
// Everything also works without this script, by links, forms and redirects. The script requests the
// same URLs and receives only the part of the page that changes.
"use strict";
(() => {
  const PART = { "X-Latchkey-Part": "1" };
  // Longer than the server waits for Latchkey, so that the server's error message arrives first.
  const WAIT_MS = 30_000;
  const TYPING_MS = 200;
  const COPIED_MS = 2_500;
  // The fields of a new token, whose input outlives the form.
  const DRAFTED = ["name", "scope", "expiry", "date", "rate", "description", "networks", "permissions", "labels"];
  // Where the list is: "/", or a path that ends with a slash.
  const HOME = `${document.documentElement.dataset.base}/`;
  const byId = (id) => document.getElementById(id);
  const one = (selector, from = document) => from.querySelector(selector);
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];

  // The URL of the whole list. It names the account if the viewer has several.
  const home = () => document.body.dataset.home;

  // ---- asking the server ----

  // A new request for the list aborts the previous one, because answers may arrive out of order.
  let asking = new AbortController();
  function supersede() {
    asking.abort();
    asking = new AbortController();
    byId("main").removeAttribute("aria-busy");
    return asking.signal;
  }

  // Returns the answer parsed as a document.
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

  // Inserts the message, dialog or list that an answer contains.
  function place(page, { focus } = {}) {
    const message = one("#message", page);
    if (message) return showMessage(message);
    const dialog = one("dialog", page);
    if (dialog) return open(dialog);
    const main = one("main", page);
    // Another server answered, so let the browser load the page and show the answer.
    if (!main) return location.assign(home());
    dismiss();
    return replaceMain(main, focus);
  }

  async function load(url, { push = false, focus } = {}) {
    const signal = supersede();
    byId("main").setAttribute("aria-busy", "true");
    const to = new URL(url, location.href);
    // Keep the number of rows for the list behind the dialog.
    const shown = location.pathname === HOME && new URLSearchParams(location.search).get("show");
    if (to.pathname !== HOME && shown) to.searchParams.set("show", shown);
    try {
      const page = await ask(to, { signal });
      if (signal.aborted) return;
      if (push && to.pathname === HOME) history.pushState(null, "", to);
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
    section.innerHTML = "<h2>This page's server did not answer</h2><p></p>";
    section.lastChild.textContent = what;
    showMessage(section);
  }

  // Shows a message in the open dialog, to preserve its input, or else above the list.
  function showMessage(section) {
    const where = one("dialog .body") || byId("main");
    all("#message").forEach((old) => old.remove());
    where.prepend(section);
    section.focus();
    section.scrollIntoView({ block: "nearest" });
  }

  // ---- the list ----

  function replaceMain(main, focus) {
    const before = byId("main");
    // Keep the search field's element while the user types, with its caret and undo history.
    const typing = document.activeElement?.id === "q" ? document.activeElement : null;
    const field = one("#q", main);
    const held = focusIn(before);
    if (typing && field) field.replaceWith(typing);
    times(main);
    before.replaceWith(main);
    if (dialogOpen() === null) main.removeAttribute("inert");
    const notice = byId("notice");
    if (typing && field) typing.focus();
    else if (notice) focusNear();
    else if (focus) (one(focus, main) || main).focus();
    else if (held) (one(held, main) || main).focus({ preventScroll: true });
    document.dispatchEvent(new Event("latchkey:list"));
    say((notice ?? byId("count"))?.textContent ?? "");
  }

  // Returns a selector that finds the focused element again after the list is replaced, or null if
  // the focus is elsewhere, for example in a dialog.
  function focusIn(main) {
    const element = document.activeElement;
    if (!main.contains(element)) return null;
    if (element.id) return `#${CSS.escape(element.id)}`;
    if (element.dataset.review) return `[data-review="${CSS.escape(element.dataset.review)}"]`;
    const row = element.closest("tr[id]");
    return row ? `#${CSS.escape(row.id)} [data-act=${element.dataset.act ?? "token"}]` : "main";
  }

  // Moves the focus back to what opened the dialog, or to the row that took a deleted row's place. No scrolling is needed: the receipt
  // is visible at any scroll position, and screen readers announce it.
  function focusNear() {
    const rows = opener ? [opener.id, opener.next, opener.previous] : [];
    const row = rows.map((id) => id && byId(id)).find(Boolean);
    const act = opener?.act && row && one(`[data-act=${opener.act}]`, row);
    const target = row && (act || one("[data-act]", row) || row);
    (target || byId("generate") || byId("main")).focus({ preventScroll: true });
  }

  async function more(link) {
    const rows = byId("rows");
    // A search that has found nothing so far continues with the next part of the list.
    if (!rows) return load(link.href, { push: true, focus: "#more" });
    if (link.getAttribute("aria-busy")) return;
    link.setAttribute("aria-busy", "true");
    try {
      const answer = await fetch(link.dataset.rows, { headers: PART, signal: AbortSignal.timeout(WAIT_MS) });
      const text = await answer.text();
      if (!answer.ok) {
        const message = one("#message", parsed(text));
        return failed(link, message && one("h2", message).textContent);
      }
      byId("more-failed")?.remove();
      link.textContent = "Show more";
      const next = answer.headers.get("X-Latchkey-Next");
      const came = all("tr", parsed(`<table><tbody>${text}</tbody></table>`));
      const added = came.filter((row) => !byId(row.id));
      added.forEach(times);
      rows.append(...added);
      const shown = rows.childElementCount;
      const place = new URL(location.href);
      place.searchParams.set("show", String(shown));
      history.replaceState(null, "", place);
      byId("shown").textContent = shown.toLocaleString("en");
      if (next) link.dataset.rows = next;
      else link.remove();
      const first = added[0]?.firstElementChild;
      if (first) {
        first.tabIndex = -1;
        first.focus({ preventScroll: true });
      } else if (!next) (byId("generate") ?? byId("main")).focus({ preventScroll: true });
      document.dispatchEvent(new Event("latchkey:list"));
      say(byId("count").textContent);
    } catch {
      failed(link);
    } finally {
      link.removeAttribute("aria-busy");
    }
  }

  // Says beside the button that loading rows failed. The focus and the rows stay where they are, and
  // the same button tries again.
  function failed(link, why) {
    const note = byId("more-failed") ?? document.createElement("p");
    note.id = "more-failed";
    note.className = "error";
    note.setAttribute("role", "alert");
    note.textContent = `${why ?? "This page's server did not answer"}.`;
    link.before(note);
    link.textContent = "Try again";
  }

  const parsed = (text) => new DOMParser().parseFromString(text, "text/html");

  let typed;
  function filter(form, delay) {
    clearTimeout(typed);
    typed = setTimeout(() => {
      const query = new URLSearchParams(new FormData(form));
      [...query].forEach(([name, value]) => value.trim() || query.delete(name));
      const url = query.size ? `${HOME}?${query}` : home();
      history.replaceState(null, "", url);
      load(url, { focus: `#${document.activeElement?.id || "q"}` });
    }, delay);
  }

  // ---- dialogs ----

  let opener = null;
  let draft = null;
  const dialogOpen = () => one("dialog");

  // Stores a selector for the element that opened the dialog, because the list may be replaced.
  function remember(element) {
    // A dialog that leads to another one keeps the element that opened the first.
    if (element.closest("dialog") && opener) return;
    const row = element.closest("tr");
    opener = {
      act: element.dataset.act,
      id: row ? row.id : element.id,
      next: row?.nextElementSibling?.id,
      previous: row?.previousElementSibling?.id,
    };
  }

  function open(dialog) {
    // A dialog that came with the page is already in place.
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
    const form = one("form[action$='/tokens']:has(#name)", dialog);
    if (form) prepare(form, Boolean(before));
    const date = one("#date", dialog);
    if (date) date.min = today();
    dialog.showModal();
    (one("[aria-invalid]", dialog) || one(".note.bad", dialog) || one("[autofocus]", dialog))?.focus();
    dialog.addEventListener("cancel", (event) => {
      event.preventDefault();
      if (!("deliberate" in dialog.dataset)) close(dialog);
    });
    // Browsers close a dialog on a second Escape despite the cancelled event, so stop the key.
    dialog.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && "deliberate" in dialog.dataset) event.preventDefault();
    });
    dialog.addEventListener("mousedown", (event) => {
      if (event.target === dialog && !("deliberate" in dialog.dataset)) close(dialog);
    });
    if (byId("secret")) draft = null;
    // This dialog reports an action that has changed the list behind it.
    if ("refresh" in dialog.dataset) refresh();
  }

  function prepare(form, again) {
    if (!draft || again) return;
    for (const [name, value] of Object.entries(draft)) form.elements[name].value = value;
    const more = one(".more", form);
    more.open = all("textarea", more).some((field) => field.value);
  }

  async function refresh() {
    const signal = supersede();
    try {
      const main = one("main", await ask(listUrl(), { signal }));
      if (main && !signal.aborted) replaceMain(main);
    } catch {
      // The dialog matters more; the next request updates the list.
    }
  }

  // The URL of the list, even if the page was opened at a dialog's URL.
  const listUrl = () => (location.pathname === HOME ? location.href : closeUrl());
  const closeUrl = () => one("dialog [data-close]")?.getAttribute("href") ?? home();

  // Keeps the form's input for the next time it opens, unless the user pressed Cancel.
  function close(dialog, { keep = true } = {}) {
    const form = one("form[action$='/tokens']:has(#name)", dialog);
    if (form) draft = keep ? Object.fromEntries(DRAFTED.map((name) => [name, form.elements[name].value])) : null;
    if (location.pathname !== HOME) {
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

  // Erases the secret from the document when its dialog closes.
  function forget(dialog) {
    all("#secret", dialog).forEach((code) => (code.textContent = ""));
    dialog.close();
    dialog.remove();
  }

  async function send(form, submitter) {
    if (form.getAttribute("aria-busy")) return;
    form.setAttribute("aria-busy", "true");
    // This change makes a list request in progress obsolete.
    supersede();
    const { date, date_end: end } = form.elements;
    if (end && date?.value) {
      const [year, month, day] = date.value.split("-").map(Number);
      end.value = new Date(year, month - 1, day, 23, 59, 59).toISOString();
    }
    try {
      const body = new URLSearchParams(new FormData(form, submitter));
      const action = submitter?.getAttribute("formaction") ?? form.getAttribute("action");
      const page = await ask(action, { method: "POST", body });
      const notice = one("#notice", page);
      place(page);
      if (notice && location.pathname !== HOME) history.replaceState(null, "", home());
    } catch {
      lost("The request may or may not have taken effect. It is safe to send it again.");
    } finally {
      form.removeAttribute("aria-busy");
    }
  }

  // ---- small things ----

  // Returns the viewer's date, as date fields write it.
  function today() {
    const now = new Date();
    return new Date(now - now.getTimezoneOffset() * 60_000).toISOString().slice(0, 10);
  }

  function say(text) {
    (one("dialog .live") || byId("live")).textContent = text;
  }

  const minute = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "short" });
  const exact = new Intl.DateTimeFormat(undefined, { dateStyle: "long", timeStyle: "long" });

  const seconds = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle: "medium" });

  function times(from) {
    for (const time of all("time", from)) {
      const at = new Date(time.dateTime);
      if (Number.isNaN(at.getTime())) continue;
      time.title = exact.format(at);
      const short = "seconds" in time.dataset ? seconds : minute;
      const text = "full" in time.dataset ? time.title : short.format(at);
      // Keeps "8:45 PM" on one line.
      time.textContent = text.replace(/(\d)\s(?=\D+$)/, "$1\u00a0");
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
      // Without permission or TLS, fall back to the old method, which copies the selection.
      if (!document.execCommand("copy")) {
        say("Not copied. The text is selected: press Ctrl+C or Command+C.");
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
    // Not form.id: its buttons are named "id".
    if (submitter?.formMethod === "post" && form.matches("#list")) {
      event.preventDefault();
      remember(submitter);
      return void send(form, submitter);
    }
    if (form.method === "get" && submitter?.name === "id") {
      event.preventDefault();
      remember(submitter);
      const query = new URLSearchParams(new FormData(form, submitter));
      query.delete("ids");
      load(`${submitter.getAttribute("formaction") ?? form.getAttribute("action")}?${query}`);
    }
  });

  // Some browsers send only "change" for lists, and for fields it comes when they lose the focus.
  document.addEventListener("change", (event) => {
    const form = event.target.matches("select") && event.target.closest("#filter");
    if (form) filter(form, 0);
  });
  for (const kind of ["input", "compositionend"]) {
    document.addEventListener(kind, (event) => {
      const form = event.target.closest?.("#filter");
      if (form && !event.isComposing) filter(form, event.target.matches("select") ? 0 : TYPING_MS);
    });
  }

  addEventListener("popstate", () => {
    if (location.pathname === HOME) load(location.href, { focus: "main" });
    else location.reload();
  });

  // Erase the secret when the user leaves, because the browser may cache the page for Back.
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
