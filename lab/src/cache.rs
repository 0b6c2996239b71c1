// SPDX-License-Identifier: MIT OR Apache-2.0
//! Built images and downloads, kept in a git-ignored folder under a key of all
//! that they are made from.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};
use sha2::{Digest, Sha256};

/// The folder's name, in the project's root.
pub const FOLDER: &str = ".lab-cache";

/// How many items of a name are kept: those of two checkouts that take turns.
const KEPT: usize = 2;

/// Hexadecimal digits of a key in an item's file name.
const KEY_DIGITS: usize = 24;

/// The folder.
pub struct Cache {
    dir: PathBuf,
}

/// What an item is made from, hashed. Order matters; each part is prefixed
/// with its length, so parts never run into each other.
#[derive(Clone)]
pub struct Key {
    hash: Sha256,
}

impl Key {
    /// Starts a key with the revision of the recipe: raise it when the code
    /// that builds the item changes what comes out.
    pub fn new(recipe: &str) -> Self {
        Self { hash: Sha256::new() }.text(recipe)
    }

    /// Adds a text.
    pub fn text(mut self, text: &str) -> Self {
        self.add(text.as_bytes());
        self
    }

    /// Adds each text of a list.
    pub fn texts<S: AsRef<str>>(self, texts: &[S]) -> Self {
        texts.iter().fold(self, |key, text| key.text(text.as_ref()))
    }

    /// Adds the content of a file.
    pub fn file(mut self, path: &Path) -> Result<Self> {
        let content = fs::read(path).with_context(|| format!("reading {}", path.display()))?;
        self.add(&content);
        Ok(self)
    }

    /// Adds the names and contents of the files of a folder tree that `wanted`
    /// accepts (by path), in sorted order.
    pub fn tree(mut self, dir: &Path, wanted: &dyn Fn(&Path) -> bool) -> Result<Self> {
        let mut entries: Vec<PathBuf> = fs::read_dir(dir)
            .and_then(|d| d.map(|e| e.map(|e| e.path())).collect())
            .with_context(|| format!("reading folder {}", dir.display()))?;
        entries.sort();
        for path in entries {
            if path.is_dir() {
                self = self.tree(&path, wanted)?;
            } else if wanted(&path) {
                self = self.text(&path.to_string_lossy()).file(&path)?;
            }
        }
        Ok(self)
    }

    /// Adds another item, or a part of one, by its path in the cache: the item's name has
    /// its key.
    pub fn item(self, path: &Path) -> Self {
        let names = path.iter().skip_while(|name| *name != FOLDER).skip(1);
        self.text(&names.collect::<PathBuf>().to_string_lossy())
    }

    fn add(&mut self, bytes: &[u8]) {
        self.hash.update((bytes.len() as u64).to_le_bytes());
        self.hash.update(bytes);
    }

    fn hex(&self) -> String {
        let digest = self.hash.clone().finalize();
        digest[..KEY_DIGITS / 2].iter().map(|b| format!("{b:02x}")).collect()
    }
}

impl Cache {
    /// Opens the folder, creating it when needed.
    pub fn open(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("creating the cache folder {}", dir.display()))?;
        Ok(Self { dir: dir.into() })
    }

    /// The folder itself.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The item's path, if it is there.
    pub fn get(&self, name: &str, key: &Key) -> Option<PathBuf> {
        let item = self.item(name, key);
        item.exists().then_some(item)
    }

    /// Returns the item's path, building it first when it is not there.
    ///
    /// `build` gets a path at which nothing exists and makes a file or a folder
    /// of it; that is renamed into place when `build` succeeds and removed when
    /// it fails. A second process that wants the same item waits for the first.
    /// Older items of the same name go, but for the newest.
    pub fn get_or_build(
        &self,
        name: &str,
        key: &Key,
        build: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let item = self.item(name, key);
        if item.exists() {
            return Ok(item);
        }
        let _lock = self.lock(name)?;
        if item.exists() {
            return Ok(item);
        }
        let temp = self.dir.join(format!("{name}.part"));
        remove(&temp)?;
        let built = build(&temp);
        if let Err(error) = built {
            remove(&temp)?;
            return Err(error);
        }
        fs::rename(&temp, &item).with_context(|| format!("moving {} into place", item.display()))?;
        self.prune(name, &item)?;
        Ok(item)
    }

    fn item(&self, name: &str, key: &Key) -> PathBuf {
        self.dir.join(format!("{name}-{}", key.hex()))
    }

    /// Removes all items of `name` but `newest` and the newest others. Of a link
    /// the link is removed, not what it leads to.
    fn prune(&self, name: &str, newest: &Path) -> Result<()> {
        let mut others = Vec::new();
        for entry in fs::read_dir(&self.dir).with_context(|| format!("reading {}", self.dir.display()))? {
            let entry = entry?;
            if is_item(&entry.file_name().to_string_lossy(), name) && entry.path() != newest {
                let changed = entry.metadata().and_then(|meta| meta.modified());
                others.push((changed.context("a file without a time")?, entry.path()));
            }
        }
        others.sort();
        let superseded = others.len().saturating_sub(KEPT - 1);
        others[..superseded].iter().try_for_each(|(_, path)| remove(path))
    }

    fn lock(&self, name: &str) -> Result<Flock<File>> {
        let path = self.dir.join(format!("{name}.lock"));
        let file = File::create(&path).with_context(|| format!("creating lock {}", path.display()))?;
        Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, errno)| errno)
            .with_context(|| format!("locking {}", path.display()))
    }
}

/// Whether this file is an item of `name`: the name and a key, nothing else.
fn is_item(file: &str, name: &str) -> bool {
    let key = file.strip_prefix(name).and_then(|rest| rest.strip_prefix('-'));
    key.is_some_and(|key| key.len() == KEY_DIGITS && key.bytes().all(|b| b.is_ascii_hexdigit()))
}

/// Removes a file or a folder tree; nothing there is fine.
fn remove(path: &Path) -> Result<()> {
    let result = match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    };
    result.with_context(|| format!("removing {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scratch(name: &str) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("ept-virt-{name}-{}", std::process::id()));
        remove(&dir).unwrap();
        dir
    }

    #[test]
    fn parts_do_not_run_into_each_other() {
        let a = Key::new("r").text("ab").text("c");
        let b = Key::new("r").text("a").text("bc");
        assert_ne!(a.hex(), b.hex());
    }

    #[test]
    fn a_part_of_an_item_is_made_from_what_the_item_is() {
        let key = |path: &str| Key::new("r").item(Path::new(path)).hex();
        assert_ne!(key("/a/.lab-cache/x-12/upgraded"), key("/a/.lab-cache/x-34/upgraded"));
        assert_ne!(key("/a/.lab-cache/x-12"), key("/a/.lab-cache/x-12/upgraded"));
        assert_eq!(key("/a/.lab-cache/x-12"), key("/b/c/.lab-cache/x-12"));
    }

    #[test]
    fn an_item_is_built_once() {
        let dir = scratch("once");
        let cache = Cache::open(&dir).unwrap();
        let key = Key::new("r");
        assert_eq!(cache.get("x", &key), None);
        let first = cache.get_or_build("x", &key, |p| Ok(fs::write(p, "1")?)).unwrap();
        assert_eq!(cache.get("x", &key).as_ref(), Some(&first));
        let second = cache.get_or_build("x", &key, |_| panic!("built twice")).unwrap();
        assert_eq!(first, second);
        remove(&dir).unwrap();
    }

    #[test]
    fn two_items_of_a_name_are_kept_and_nothing_else_is_touched() {
        let dir = scratch("prune");
        let elsewhere = scratch("prune-elsewhere");
        fs::create_dir_all(&elsewhere).unwrap();
        let cache = Cache::open(&dir).unwrap();
        let linked = dir.join(format!("x-{}", Key::new("0").hex()));
        std::os::unix::fs::symlink(&elsewhere, &linked).unwrap();
        for bystander in ["x-y-0123456789abcdef01234567", "x-notes", "x.log"] {
            fs::write(dir.join(bystander), "").unwrap();
        }
        let mut made = Vec::new();
        for recipe in ["1", "2", "3"] {
            // File times have a granularity.
            std::thread::sleep(std::time::Duration::from_millis(20));
            made.push(cache.get_or_build("x", &Key::new(recipe), |p| Ok(fs::create_dir(p)?)).unwrap());
        }
        assert!(!linked.is_symlink() && elsewhere.exists());
        assert_eq!(made.iter().map(|p| p.exists()).collect::<Vec<_>>(), [false, true, true]);
        for bystander in ["x-y-0123456789abcdef01234567", "x-notes", "x.log"] {
            assert!(dir.join(bystander).exists(), "{bystander}");
        }
        remove(&dir).unwrap();
        remove(&elsewhere).unwrap();
    }

    #[test]
    fn a_failed_build_leaves_nothing() {
        let dir = scratch("failed");
        let cache = Cache::open(&dir).unwrap();
        let key = Key::new("r");
        let result = cache.get_or_build("x", &key, |p| {
            fs::create_dir(p)?;
            anyhow::bail!("half-done")
        });
        assert!(result.is_err());
        let left: Vec<_> = fs::read_dir(&dir).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(left, ["x.lock"]);
        remove(&dir).unwrap();
    }
}
