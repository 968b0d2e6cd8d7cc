//! The objects that the provider sent, by kind and UID, and their names.

use prost::Message;
use redb::{ReadTransaction, ReadableTable, WriteTransaction};
use skerry_proto::link::{self, Kind, Upsert, change};
use skerry_proto::object::{ObjectKey, Uid};

use super::digest::Held;
use super::ended::{self, MAX_ENDED};
use super::{NAMES, OBJECTS, ObjectChanged, Store, StoreError, StoredObject};

impl Store {
    /// The object with that kind and UID.
    pub fn get(&self, key: &ObjectKey) -> Result<Option<StoredObject>, StoreError> {
        self.file()
            .read(|transaction| get(transaction, key.kind, key.uid.as_str()))
    }

    /// The object with that name; `namespace` is empty for cluster-scoped kinds.
    pub fn find(&self, kind: Kind, namespace: &str, name: &str) -> Result<Option<StoredObject>, StoreError> {
        self.file().read(|transaction| {
            let names = transaction.open_table(NAMES)?;
            match names.get((kind_byte(kind), namespace, name))? {
                Some(uid) => get(transaction, kind, uid.value()),
                None => Ok(None),
            }
        })
    }

    /// All objects of a kind, ordered by UID. One that cannot be read is logged and left out.
    pub fn list(&self, kind: Kind) -> Result<Vec<StoredObject>, StoreError> {
        let mut found = Vec::new();
        self.each(kind, |object| found.push(object))?;
        Ok(found)
    }

    /// Shows every object of a kind, ordered by UID, one at a time: for kinds of which there may be thousands. One that
    /// cannot be read is logged and left out; answers how many were shown and how many left out.
    pub fn each(&self, kind: Kind, mut show: impl FnMut(StoredObject)) -> Result<(usize, usize), StoreError> {
        self.file().read(|transaction| {
            let objects = transaction.open_table(OBJECTS)?;
            let byte = kind_byte(kind);
            let (mut shown, mut unreadable) = (0, 0);
            for entry in objects.range((byte, "")..(byte + 1, ""))? {
                let (key, value) = entry?;
                match decode_object(value.value()) {
                    Ok(object) => {
                        show(object);
                        shown += 1;
                    }
                    Err(error) => {
                        let uid = Uid::from(key.value().1);
                        tracing::error!(%uid, %error, "a stored object is left out; the provider is asked for it again");
                        drop(self.distrust(&ObjectKey { kind, uid }));
                        unreadable += 1;
                    }
                }
            }
            Ok((shown, unreadable))
        })
    }

    /// UIDs of the objects of a kind, in order.
    pub fn uids(&self, kind: Kind) -> Result<Vec<Uid>, StoreError> {
        self.file().read(|transaction| {
            let objects = transaction.open_table(OBJECTS)?;
            let byte = kind_byte(kind);
            objects
                .range((byte, "")..(byte + 1, ""))?
                .map(|entry| Ok(Uid::from(entry?.0.value().1)))
                .collect()
        })
    }

    /// How many objects of a kind are stored.
    pub fn count(&self, kind: Kind) -> Result<usize, StoreError> {
        self.file().read(|transaction| {
            let objects = transaction.open_table(OBJECTS)?;
            let byte = kind_byte(kind);
            let mut count = 0;
            for entry in objects.range((byte, "")..(byte + 1, ""))? {
                entry?;
                count += 1;
            }
            Ok(count)
        })
    }
}

fn get(transaction: &ReadTransaction, kind: Kind, uid: &str) -> Result<Option<StoredObject>, StoreError> {
    let objects = transaction.open_table(OBJECTS)?;
    objects
        .get((kind_byte(kind), uid))?
        .map(|value| decode_object(value.value()))
        .transpose()
}

/// Carries out the provider's changes; answers what to tell the rooms once they are on disk.
pub(super) fn apply(
    transaction: &WriteTransaction,
    changes: &[change::Change],
) -> Result<Vec<ObjectChanged>, StoreError> {
    let mut notices = Vec::with_capacity(changes.len());
    let mut objects = transaction.open_table(OBJECTS)?;
    let mut names = transaction.open_table(NAMES)?;
    let mut held = Held::open(transaction)?;
    for change in changes {
        let notice = match change {
            change::Change::Upsert(upsert) => {
                upsert_object(&mut objects, &mut names, &mut held, upsert.clone())?
            }
            change::Change::Remove(remove) => {
                let notice = remove_object(&mut objects, &mut names, &mut held, remove)?;
                if notice.is_some() && remove.kind() == Kind::Pod {
                    ended::bury(transaction, &remove.uid, MAX_ENDED)?;
                }
                notice
            }
        };
        notices.extend(notice);
    }
    held.save(transaction)?;
    Ok(notices)
}

type ObjectTable<'t> = redb::Table<'t, (u8, &'static str), &'static [u8]>;
type NameTable<'t> = redb::Table<'t, (u8, &'static str, &'static str), &'static str>;

fn upsert_object(
    objects: &mut ObjectTable<'_>,
    names: &mut NameTable<'_>,
    held: &mut Held<'_>,
    upsert: Upsert,
) -> Result<Option<ObjectChanged>, StoreError> {
    let encoded = upsert.encode_to_vec();
    let object = match StoredObject::try_from(upsert) {
        Ok(object) => object,
        Err(error) => {
            tracing::error!(%error, "an object from the provider is not stored");
            return Ok(None);
        }
    };
    let byte = kind_byte(object.key.kind);
    let before = objects
        .insert((byte, object.key.uid.as_str()), encoded.as_slice())?
        .map(|value| place_of(value.value()));
    let entry = skerry_proto::digest::Entry {
        hash: object.hash,
        expires_unix: object.expires_unix,
    };
    held.put(byte, object.key.uid.as_str(), entry)?;
    // No name stays behind that points to nothing once the object goes.
    if let Some((namespace, name)) = before
        && (namespace != object.namespace || name != object.name)
    {
        disown(names, byte, &namespace, &name, object.key.uid.as_str())?;
    }
    names.insert(
        (byte, object.namespace.as_str(), object.name.as_str()),
        object.key.uid.as_str(),
    )?;
    Ok(Some(ObjectChanged {
        key: object.key,
        namespace: object.namespace,
        name: object.name,
        removed: false,
    }))
}

fn remove_object(
    objects: &mut ObjectTable<'_>,
    names: &mut NameTable<'_>,
    held: &mut Held<'_>,
    remove: &link::Remove,
) -> Result<Option<ObjectChanged>, StoreError> {
    let kind = remove.kind();
    let byte = kind_byte(kind);
    held.remove(byte, &remove.uid)?;
    let gone = objects
        .remove((byte, remove.uid.as_str()))?
        .map(|value| place_of(value.value()));
    let Some((namespace, name)) = gone else {
        return Ok(None);
    };
    disown(names, byte, &namespace, &name, &remove.uid)?;
    Ok(Some(ObjectChanged {
        key: ObjectKey {
            kind,
            uid: Uid::from(remove.uid.as_str()),
        },
        namespace,
        name,
        removed: true,
    }))
}

/// Takes a name from an object, unless it belongs already to a successor with another UID.
fn disown(
    names: &mut NameTable<'_>,
    byte: u8,
    namespace: &str,
    name: &str,
    uid: &str,
) -> Result<(), StoreError> {
    let place = (byte, namespace, name);
    let owned = names.get(place)?.is_some_and(|owner| owner.value() == uid);
    if owned {
        names.remove(place)?;
    }
    Ok(())
}

/// Namespace and name of a stored object; empty when it cannot be read.
fn place_of(encoded: &[u8]) -> (String, String) {
    match Upsert::decode(encoded) {
        Ok(object) => (object.namespace, object.name),
        Err(_) => (String::new(), String::new()),
    }
}

pub(super) fn decode_object(encoded: &[u8]) -> Result<StoredObject, StoreError> {
    Upsert::decode(encoded)
        .map_err(|e| StoreError::Value {
            what: "object".to_owned(),
            reason: e.to_string(),
        })?
        .try_into()
}

/// The kind's number in keys; the proto file promises that numbers are never reused.
pub(super) fn kind_byte(kind: Kind) -> u8 {
    // Kinds are few and numbered from 0; the enum has no value beyond 255.
    u8::try_from(i32::from(kind)).unwrap_or(0)
}
