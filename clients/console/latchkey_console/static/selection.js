// Selecting rows of the list: counts them, selects all, and shows the bar for what is selected.
// Without this script, the bar is always there and deletes what is selected.
"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const boxes = () => [...document.querySelectorAll("#rows .pick")];
  // As many as one request deletes. The server refuses more.
  const PICKED_MAX = 500;
  // The row of the last click, from which Shift extends the selection.
  let last = null;

  function show({ say = true } = {}) {
    const bar = byId("picked");
    if (!bar) return;
    const every = boxes();
    const count = every.filter((box) => box.checked).length;
    bar.classList.toggle("some", count > 0);
    const excess = count > PICKED_MAX ? `. Select at most ${PICKED_MAX} to delete them.` : "";
    const text = `${count} selected${excess}`;
    byId("picked-count").textContent = text;
    byId("delete-picked").disabled = count > PICKED_MAX;
    const all = byId("pick-all");
    all.checked = count > 0 && count === every.length;
    all.indeterminate = count > 0 && count < every.length;
    if (say) byId("live").textContent = text;
  }

  document.addEventListener("click", (event) => {
    const box = event.target.closest?.("#rows .pick");
    if (!box) return;
    const every = boxes();
    const from = every.indexOf(last);
    if (event.shiftKey && from >= 0) {
      const to = every.indexOf(box);
      every.slice(Math.min(from, to), Math.max(from, to) + 1).forEach((one) => {
        one.checked = box.checked;
      });
    }
    last = box;
    show();
  });

  document.addEventListener("change", (event) => {
    if (event.target.id !== "pick-all") return;
    boxes().forEach((box) => (box.checked = event.target.checked));
    show();
  });

  document.addEventListener("click", (event) => {
    if (event.target.id !== "unpick") return;
    boxes().forEach((box) => (box.checked = false));
    show();
    byId("pick-all").focus();
  });

  // The list was replaced, or has more rows.
  document.addEventListener("latchkey:list", () => show({ say: false }));
  // Browsers restore the boxes of a page that they load again.
  addEventListener("pageshow", () => show({ say: false }));
})();
