/*
 * A table of the store in memory: a B+tree. Its pages hold pointers to rows, with each row's first
 * bytes beside the pointer, so that a search reads a few neighbouring lines and, in most cases, one
 * row: what it costs in a large table is what misses the cache. (A skip list was here before; of
 * 10,000 stores at once it took a quarter of a simulation's time.)
 *
 * A page is freed when it is empty and never merged with another one (Johnson and Shasha, "B-trees
 * with Inserts and Deletes: Why Free-at-Empty Is Better Than Merge-at-Half", 1993). A full page
 * that is added to at its end is left full, as queues fill their pages. An inner page's entry is
 * the first one of its child.
 */
#include <endian.h>
#include <stdlib.h>
#include <string.h>

#include "shared/base/buf.h"
#include "shared/store/memory_internal.h"

#define PAGE_MAX  32u /* entries of a page */
#define PAGE_FEW  2u  /* what a table's first page begins with, and */
#define PAGE_SOME 8u  /* one behind a full one, or above it; they double */
#define GROWN_MAX (MEM_DEPTH_MAX + 1)

struct mem_page {
    uint32_t n, cap;
    mem_entry entries[]; /* [cap]; an inner page's children follow: mem_page *[cap] */
};

static mem_page **children(mem_page *page)
{
    return (mem_page **)(page->entries + page->cap);
}

static size_t page_bytes(uint32_t cap, bool inner)
{
    return sizeof(mem_page) + cap * (sizeof(mem_entry) + (inner ? sizeof(mem_page *) : 0));
}

static uint64_t prefix_of(sh_slice key)
{
    uint64_t prefix = 0;
    if (key.n >= sizeof prefix)
        memcpy(&prefix, key.data, sizeof prefix);
    else
        memcpy(&prefix, key.data, key.n);
    return be64toh(prefix);
}

static int compare(const mem_entry *e, uint64_t prefix, sh_slice key)
{
    if (e->prefix != prefix)
        return e->prefix < prefix ? -1 : 1;
    size_t n = SH_MIN((size_t)e->row->key_n, key.n);
    int order = memcmp(e->row->bytes, key.data, n);
    return order ? order : (e->row->key_n > key.n) - (e->row->key_n < key.n);
}

/* Entries below the key; with `equal`, the key's own as well. */
static uint32_t below(const mem_page *page, uint64_t prefix, sh_slice key, bool equal)
{
    uint32_t from = 0, to = page->n;
    while (from < to) {
        uint32_t mid = (from + to) / 2;
        if (compare(&page->entries[mid], prefix, key) < (equal ? 1 : 0))
            from = mid + 1;
        else
            to = mid;
    }
    return from;
}

/* ---- finding ---- */

void mem_tree_find(const mem_table *table, sh_slice key, bool after, mem_path *path)
{
    uint64_t prefix = prefix_of(key);
    mem_page *page = table->root;
    path->depth = table->depth;
    for (uint32_t l = 0; l < table->depth; l++) {
        bool leaf = l + 1 == table->depth;
        uint32_t at = below(page, prefix, key, after || !leaf);
        path->page[l] = page;
        path->at[l] = leaf || at == 0 ? at : at - 1;
        if (!leaf)
            page = children(page)[path->at[l]];
    }
}

/* To the first row of the page behind the path's last one, when it has come to that one's end. */
static mem_row *row_at(mem_path *path)
{
    uint32_t leaf = path->depth - 1, l = leaf;
    if (path->depth == 0)
        return NULL;
    if (path->at[leaf] < path->page[leaf]->n)
        return path->page[leaf]->entries[path->at[leaf]].row;
    do {
        if (l == 0)
            return NULL;
        l--;
    } while (path->at[l] + 1 >= path->page[l]->n);
    path->at[l]++;
    for (; l < leaf; l++) {
        path->page[l + 1] = children(path->page[l])[path->at[l]];
        path->at[l + 1] = 0;
    }
    return path->page[leaf]->entries[0].row;
}

mem_row *mem_tree_seek(const mem_table *table, sh_slice key, bool after, mem_path *path)
{
    mem_tree_find(table, key, after, path);
    return row_at(path);
}

mem_row *mem_tree_next(mem_path *path)
{
    path->at[path->depth - 1]++;
    return row_at(path);
}

static mem_row *edge(const mem_table *table, mem_path *path, bool last)
{
    mem_page *page = table->root;
    path->depth = table->depth;
    for (uint32_t l = 0; l < table->depth; l++) {
        path->page[l] = page;
        path->at[l] = last ? page->n - 1 : 0;
        if (l + 1 < table->depth)
            page = children(page)[path->at[l]];
    }
    return row_at(path);
}

mem_row *mem_tree_first(const mem_table *table, mem_path *path)
{
    return edge(table, path, false);
}

mem_row *mem_tree_last(const mem_table *table, mem_path *path)
{
    return edge(table, path, true);
}

mem_row *mem_tree_found(const mem_path *path, sh_slice key)
{
    if (path->depth == 0)
        return NULL;
    const mem_page *leaf = path->page[path->depth - 1];
    uint32_t at = path->at[path->depth - 1];
    if (at == leaf->n || compare(&leaf->entries[at], prefix_of(key), key) != 0)
        return NULL;
    return leaf->entries[at].row;
}

mem_row *mem_tree_get(const mem_table *table, sh_slice key)
{
    uint64_t prefix = prefix_of(key);
    mem_page *page = table->root;
    for (uint32_t l = 1; l < table->depth; l++) {
        uint32_t at = below(page, prefix, key, true);
        page = children(page)[at ? at - 1 : 0];
    }
    uint32_t at = page ? below(page, prefix, key, false) : 0;
    if (!page || at == page->n || compare(&page->entries[at], prefix, key) != 0)
        return NULL;
    return page->entries[at].row;
}

/* ---- changing ---- */

/* The pages above name the first entry of the path's page of this level anew. */
static void name_first(mem_path *path, uint32_t level)
{
    for (; level > 0 && path->at[level] == 0; level--)
        path->page[level - 1]->entries[path->at[level - 1]] = path->page[level]->entries[0];
}

static void hang(mem_table *table, mem_path *path, uint32_t level, mem_page *page)
{
    path->page[level] = page;
    if (level == 0)
        table->root = page;
    else
        children(path->page[level - 1])[path->at[level - 1]] = page;
}

void mem_tree_replace(mem_table *table, mem_path *path, mem_row *row)
{
    uint32_t leaf = path->depth - 1;
    path->page[leaf]->entries[path->at[leaf]].row = row;
    name_first(path, leaf);
    table->version++;
}

static void put_entry(mem_page *page, uint32_t at, mem_entry entry, mem_page *child)
{
    memmove(&page->entries[at + 1], &page->entries[at], (page->n - at) * sizeof(mem_entry));
    page->entries[at] = entry;
    if (child) {
        mem_page **to = children(page) + at;
        memmove(to + 1, to, (page->n - at) * sizeof(*to));
        *to = child;
    }
    page->n++;
}

/* The upper part of a full page goes to an empty one: half of it, or nothing when it grows at its
 * end. */
static void divide(mem_page *page, mem_page *right, uint32_t at, bool inner)
{
    uint32_t from = at == page->n ? page->n : page->n / 2;
    right->n = page->n - from;
    memcpy(right->entries, &page->entries[from], right->n * sizeof(mem_entry));
    if (inner)
        memcpy(children(right), children(page) + from, right->n * sizeof(mem_page *));
    page->n = from;
}

/* A page that must be there comes from where no test's allocator fails it. */
static mem_page *new_page(uint32_t cap, bool inner, bool must)
{
    mem_page *page =
        must ? calloc(1, page_bytes(cap, inner)) : sh_calloc(1, page_bytes(cap, inner));
    if (page)
        page->cap = cap;
    return page;
}

/* The path's page of this level gets room for twice as much. */
static bool enlarge(mem_table *table, mem_path *path, uint32_t level, bool must)
{
    mem_page *page = path->page[level];
    bool inner = level + 1 < path->depth;
    mem_page *larger = new_page(page->cap * 2, inner, must);
    if (!larger)
        return false;
    larger->n = page->n;
    memcpy(larger->entries, page->entries, page->n * sizeof(mem_entry));
    if (inner)
        memcpy(children(larger), children(page), page->n * sizeof(mem_page *));
    hang(table, path, level, larger);
    free(page);
    return true;
}

/* All that an insert at the path needs: a page beside each full one from the leaf up, and a root.
 */
static bool make_room(mem_table *table, mem_path *path, mem_page *pages[GROWN_MAX], bool must)
{
    uint32_t n = 0;
    bool made = true;
    for (uint32_t l = path->depth; made && l-- > 0;) {
        const mem_page *page = path->page[l];
        bool inner = l + 1 < path->depth, at_end = path->at[l] + inner == page->n;
        if (page->n < page->cap)
            break;
        if (page->cap < PAGE_MAX) {
            made = enlarge(table, path, l, must);
            break;
        }
        pages[n] = new_page(at_end ? PAGE_SOME : PAGE_MAX, inner, must);
        made = pages[n] != NULL;
        n += made;
        if (made && l == 0) {
            pages[n] = new_page(PAGE_SOME, true, must);
            made = pages[n] != NULL;
            n += made;
        }
    }
    while (!made && n > 0)
        free(pages[--n]);
    return made;
}

static void add_root(mem_table *table, mem_page *root, mem_page *right)
{
    mem_page *left = table->root;
    put_entry(root, 0, left->entries[0], left);
    put_entry(root, 1, right->entries[0], right);
    table->root = root;
    table->depth++;
    SH_ASSERT(table->depth <= MEM_DEPTH_MAX);
}

/* Puts the entry into the path's page of its level; a full one is divided first, which puts an
 * entry into the page above. */
static void insert(mem_table *table, mem_path *path, mem_entry entry, mem_page **pages)
{
    mem_page *child = NULL;
    for (uint32_t l = path->depth - 1;; l--) {
        mem_page *page = path->page[l], *right = NULL;
        uint32_t at = path->at[l] + (child ? 1 : 0);
        if (page->n < page->cap) {
            put_entry(page, at, entry, child);
        } else {
            right = *pages++;
            divide(page, right, at, child != NULL);
            if (at > page->n || page->n == PAGE_MAX)
                put_entry(right, at - page->n, entry, child);
            else
                put_entry(page, at, entry, child);
        }
        if (at == 0)
            name_first(path, l);
        if (!right)
            return;
        if (l == 0) {
            add_root(table, *pages, right);
            return;
        }
        entry = right->entries[0];
        child = right;
    }
}

bool mem_tree_insert(mem_table *table, mem_path *path, mem_row *row, bool must)
{
    mem_page *pages[GROWN_MAX];
    if (!table->root) {
        table->root = new_page(PAGE_FEW, false, must);
        if (!table->root)
            return false;
        *path = (mem_path){.page = {table->root}, .depth = 1};
        table->depth = 1;
    }
    if (!make_room(table, path, pages, must))
        return false;
    insert(table, path, (mem_entry){prefix_of((sh_slice){row->bytes, row->key_n}), row}, pages);
    table->count++;
    table->version++;
    return true;
}

static void drop_levels(mem_table *table)
{
    while (table->depth > 1 && table->root->n == 1) {
        mem_page *root = table->root;
        table->root = children(root)[0];
        table->depth--;
        free(root);
    }
    if (table->root->n == 0) {
        free(table->root);
        table->root = NULL;
        table->depth = 0;
    }
}

void mem_tree_remove(mem_table *table, mem_path *path)
{
    uint32_t l = path->depth - 1;
    for (;; l--) {
        mem_page *page = path->page[l];
        uint32_t at = path->at[l];
        page->n--;
        memmove(&page->entries[at], &page->entries[at + 1], (page->n - at) * sizeof(mem_entry));
        if (l + 1 < path->depth) {
            mem_page **from = children(page) + at;
            memmove(from, from + 1, (page->n - at) * sizeof(*from));
        }
        if (page->n > 0 || l == 0)
            break;
        free(page);
    }
    if (path->page[l]->n > 0)
        name_first(path, l);
    drop_levels(table);
    table->count--;
    table->version++;
}

static void free_page(mem_page *page, uint32_t depth)
{
    for (uint32_t k = 0; k < page->n; k++) {
        if (depth > 1)
            free_page(children(page)[k], depth - 1);
        else
            free(page->entries[k].row);
    }
    free(page);
}

void mem_tree_clear(mem_table *table)
{
    if (table->root)
        free_page(table->root, table->depth);
    *table = (mem_table){.version = table->version + 1};
}
