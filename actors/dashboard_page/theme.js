// Before anything is painted: the colours that were chosen here last. Without a choice the system's are used.
(() => {
  try {
    const chosen = localStorage.getItem("longroll-theme");
    if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
  } catch {
    // Storage is refused: the system's colours.
  }
})();
