(function () {
  var root = document.documentElement, button = document.getElementById("theme");
  var themes = ["system", "light", "dark"], key = "viaticum-theme", at = 0;
  function keep(value) { try { localStorage.setItem(key, value); } catch (error) { /* a file may not keep anything */ } }
  function kept() { try { return localStorage.getItem(key); } catch (error) { return null; } }
  function show() {
    if (themes[at] === "system") root.removeAttribute("data-theme"); else root.setAttribute("data-theme", themes[at]);
    button.textContent = "Theme: " + themes[at];
  }
  at = Math.max(0, themes.indexOf(kept()));
  button.hidden = false;
  button.addEventListener("click", function () { at = (at + 1) % themes.length; keep(themes[at]); show(); });
  show();
  window.addEventListener("beforeprint", function () {
    document.querySelectorAll("details:not([open])").forEach(function (each) { each.open = true; each.dataset.closed = ""; });
  });
  window.addEventListener("afterprint", function () {
    document.querySelectorAll("details[data-closed]").forEach(function (each) { each.open = false; delete each.dataset.closed; });
  });
})();
