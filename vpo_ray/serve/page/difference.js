// What a prompt kept of a query, what it left out and what it added: by the longest common subsequence of
// their words (characters, where a script writes without spaces).

// A word goes with the punctuation behind it, and is the same word without.
const WORDS = new RegExp(
  String.raw`(?:[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Thai}]\p{M}*`
    + String.raw`|[\p{L}\p{N}][\p{L}\p{M}\p{N}'’-]*|[^\s\p{L}\p{N}])[^\s\p{L}\p{N}]*\s*`, "gu");
const bare = (word) => word.normalize("NFKC").toLowerCase().replace(/[^\p{L}\p{M}\p{N}]+/gu, "") || word.trim();
// Cells of the table above which texts are not compared: 32 MB.
const MOST = 1 << 24;

// Two rows of [tag, text]: of the query (mark kept, del removed) and of the prompt (mark kept, ins added).
export function difference(query, prompt) {
  const [a, b] = [query, prompt].map((text) => text.match(WORDS) || []);
  if (a.length * b.length > MOST) return [[["span", query]], [["span", prompt]]];
  const [x, y] = [a, b].map((words) => words.map(bare));
  const longest = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i--)
    for (let j = b.length - 1; j >= 0; j--)
      longest[i][j] = x[i] === y[j] ? longest[i + 1][j + 1] + 1 : Math.max(longest[i + 1][j], longest[i][j + 1]);
  const rows = [[], []];
  const put = (row, tag, word) => {
    if (row.length && row.at(-1)[0] === tag) row.at(-1)[1] += word;
    else row.push([tag, word]);
  };
  let i = 0, j = 0;
  while (i < a.length || j < b.length) {
    if (i < a.length && j < b.length && x[i] === y[j]) { put(rows[0], "mark", a[i++]); put(rows[1], "mark", b[j++]); }
    else if (j >= b.length || (i < a.length && longest[i + 1][j] >= longest[i][j + 1])) put(rows[0], "del", a[i++]);
    else put(rows[1], "ins", b[j++]);
  }
  return rows;
}
